"""Atomic, pickle-free storage of a run's state: a tree of tensors and plain values as safetensors plus JSON.

The JSON file names the tensor file that belongs to it and is replaced last, in one rename: whoever is killed in
between leaves the previous state whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "state.json"
_TENSOR = "__tensor__"
_ITEMS = "__items__"


def save(folder: Path, tree: Any, step: int) -> None:
    """Replaces the state in ``folder`` by ``tree`` (dicts, lists, tuples, tensors, numbers, strings, None)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    plain = _pack(tree, "", tensors)
    name = f"state-{step:06d}.safetensors"
    partial = folder / (name + ".tmp")
    save_file(tensors, partial)
    _sync(partial)
    partial.replace(folder / name)
    index = folder / (INDEX + ".tmp")
    index.write_text(json.dumps({"tensors": name, "state": plain}))
    _sync(index)
    index.replace(folder / INDEX)
    for old in folder.glob("state-*.safetensors*"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load(folder: Path) -> Any:
    """The tree stored in ``folder``. Raises ValueError when there is none, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / INDEX).is_file():
        raise ValueError(f"resume: expected a folder with {INDEX} in it, got {str(folder)!r}; start without resume=")
    try:
        index = json.loads((folder / INDEX).read_text())
        tensors = load_file(folder / index["tensors"])
        return _unpack(index["state"], tensors)
    except (json.JSONDecodeError, SafetensorError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"resume: the state in {str(folder)!r} is damaged ({error}); start without resume=") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _pack(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(tree, dict):
        # pairs, because JSON would turn an optimizer's integer keys into strings
        return {_ITEMS: [[key, _pack(value, f"{path}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [_pack(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"state: cannot store {type(tree).__name__} at {path!r}; expected tensors, numbers, strings or None"
    )


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(value, tensors) for value in tree]
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {key: _unpack(value, tensors) for key, value in tree[_ITEMS]}
    return tree


def random_state() -> dict[str, Tensor]:
    """PyTorch's global random states: the CPU's and every CUDA device's in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            states[f"cuda:{i}"] = torch.cuda.get_rng_state(i)
    return states


def restore_random_state(states: dict[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state, device)
