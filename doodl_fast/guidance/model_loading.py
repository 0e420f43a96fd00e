"""Loads the models that guides look at pictures with, and refuses those that lack weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.networks import check_source, loading

SHOWN = 5
"""How many names of weights an error lists."""


def read_tensors(source: str | Path, argument: str, expected: str) -> dict[str, Tensor]:
    """Reads the tensors of a file by their names. Code in a pickle is never run.

    Args:
        source: A .safetensors file, or one that `torch.save` made of a dict of tensors, or of a dict that holds such a
            dict as its "state_dict", which is what open_clip's training code stores.
        argument: What errors call the file.
        expected: What the file should hold, for the error if it is missing.

    Raises:
        ValueError: The file is missing, cannot be read, or does not hold tensors by names.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"{argument}: the file {str(source)!r} does not exist; expected {expected}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Each of pickle, torch and safetensors has errors of its own.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{argument}: {str(source)!r} cannot be read as safetensors or a plain state dict: {reason}"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    entries = dict(found) if isinstance(found, Mapping) else {}
    if not entries or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries.items()):
        got = "a dict of other values" if entries else type(found).__name__
        raise ValueError(f"{argument}: expected {expected} in {str(source)!r}, got {got} in the place of named tensors")
    return entries


def load_words(kind: Any, source: str | Path) -> Any:
    """Loads the tokenizer or the processor of texts that a model's own folder lacks.

    Args:
        kind: A class of transformers with `from_pretrained`: AutoTokenizer, or AutoProcessor.
        source: A folder or a hub id.

    Raises:
        ValueError: There is none.
    """
    words = check_source(source, "tokenizer_config.json", "processor")
    with loading(words, "processor"):
        return kind.from_pretrained(words)


def load_model(
    kind: Any,
    source: str | Path,
    dtype: torch.dtype,
    config: Any = None,
    state: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> tuple[Any, str]:
    """Loads a transformers model from safetensors files.

    Args:
        kind: A class of transformers, one of its `Auto` classes for instance.
        source: A folder or a hub id.
        dtype: The dtype of the weights.
        config: The model's config, if `source` is a file whose weights have been read.
        state: Those weights, by the names that transformers gives to them.
        **more: What else the model's class is called with.

    Returns:
        The model in eval mode, and the folder or hub id as text.

    Raises:
        ValueError: There is no such model, or it lacks weights of `kind`, or has them in other shapes: transformers
            would make those up at random.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, **more}
    name = str(source) if state is not None else check_source(source, "config.json", "guidance model")
    with loading(name, "guidance model"):
        if state is None:
            model, report = kind.from_pretrained(name, use_safetensors=True, **options)
        else:
            model, report = kind.from_pretrained(None, config=config, state_dict=dict(state), **options)
    missing = sorted(report.get("missing_keys", ()))
    mismatched = sorted(report.get("mismatched_keys", ()), key=str)
    others = sorted(report.get("unexpected_keys", ())) if state is not None else []
    if others:
        raise ValueError(
            f"guidance model: expected the weights of a {type(model).__name__} alone in {name!r}, got "
            f"{_listed(list(map(repr, others)))} too; it is a model of another architecture"
        )
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
