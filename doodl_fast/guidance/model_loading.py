"""Loads the models that guides look at pictures with, and refuses those that lack weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..diffusion.networks import check_source, loading

SHOWN = 5
"""How many names of weights an error lists."""


def load_model(kind: Any, source: str | Path, dtype: torch.dtype) -> tuple[Any, str]:
    """Loads a transformers model from safetensors files.

    Args:
        kind: A class of transformers, one of its `Auto` classes for instance.
        source: A folder or a hub id.
        dtype: The dtype of the weights.

    Returns:
        The model in eval mode, and the folder or hub id as text.

    Raises:
        ValueError: There is no such model, or it lacks weights of `kind`, or has them in other shapes: transformers
            would make those up at random.
    """
    name = check_source(source, "config.json", "guidance model")
    with loading(name, "guidance model"):
        model, report = kind.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    missing = sorted(report.get("missing_keys", ()))
    mismatched = sorted(report.get("mismatched_keys", ()), key=str)
    if missing or mismatched:
        shapes = [f"{key!r} of shape {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in mismatched]
        parts = [f"it lacks {_listed(list(map(repr, missing)))}"] if missing else []
        parts += [f"it has {_listed(shapes)}"] if shapes else []
        raise ValueError(
            f"guidance model: expected all weights of {type(model).__name__} in {name!r}, but {' and '.join(parts)}; "
            "they would be random numbers. Give a model that was trained for this use"
        )
    return model.eval(), name


def _listed(names: list[str]) -> str:
    """Joins the first few names, and says how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
