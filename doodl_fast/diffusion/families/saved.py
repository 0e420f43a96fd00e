"""Which family serves a saved pipeline, by its model_index.json, before anything else of it is read."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from . import FAMILIES, Family, family_of_class
from .base import ADAPTERS

LEFT_OUT = ("safety_checker", "watermarker")
"""Components that are not loaded: they look at finished pictures alone."""


def saved_components(index: Mapping[str, Any]) -> dict[str, str]:
    """Returns the class names of a saved pipeline's components, by the components' names.

    Args:
        index: The content of model_index.json.
    """
    return {
        name: str(entry[-1])
        for name, entry in index.items()
        if not name.startswith("_") and name not in LEFT_OUT and isinstance(entry, (list, tuple)) and any(entry)
    }


def pipeline_class(index: Mapping[str, Any]) -> Any:
    """Returns diffusers' class of a saved pipeline, or None if diffusers has none of that name."""
    import diffusers

    name = index.get("_class_name")
    return getattr(diffusers, name, None) if isinstance(name, str) else None


def family_of_index(index: Mapping[str, Any], source: str, family: Family | None = None) -> Family:
    """Picks the family of a saved pipeline by its class, and checks its list of components.

    Args:
        index: The content of model_index.json.
        source: The folder or hub id, for errors.
        family: The family to use instead of the one that the class picks.

    Raises:
        ValueError: No family serves the class, a component is missing, or one would be ignored.
    """
    bases = getattr(pipeline_class(index), "__mro__", ())
    names = list(dict.fromkeys([str(index.get("_class_name")), *(base.__name__ for base in bases)]))
    parts = saved_components(index)
    if family is None:
        family = next((found for found in map(family_of_class, names) if found is not None), None)
    if family is None and "transformer" in parts:
        known = ", ".join(name for other in FAMILIES for name in other.pipelines)
        raise ValueError(
            f"model: {names[0]} in {source!r} is no pipeline that is known; expected one of {known}, or {ADAPTERS}"
        )
    family = FAMILIES[0] if family is None else family
    family.check_saved(parts, names, source)
    return family


def check_accelerate(index: Mapping[str, Any], source: str) -> None:
    """Raises ValueError for a network that diffusers loads with the library accelerate alone, if that is missing.

    These are networks that keep some of their weights in float32, as Wan's do.
    """
    import diffusers

    if importlib.util.find_spec("accelerate") is not None:
        return
    for name, kind in saved_components(index).items():
        if getattr(getattr(diffusers, kind, None), "_keep_in_fp32_modules", None):
            raise ValueError(
                f"model: {source!r} cannot be loaded: its {name} is a {kind}, which diffusers loads with the library "
                "accelerate alone; pip install accelerate"
            )


def upcasts_vae(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline runs its VAE in float32 where its networks are in fp16, if the VAE's config asks for it.

    diffusers' pipelines that do so have a method `upcast_vae`. Without a class, it is known of Stable Diffusion XL.
    """
    kind = pipeline_class(index)
    return {"unet", "text_encoder_2"} <= saved_components(index).keys() if kind is None else hasattr(kind, "upcast_vae")
