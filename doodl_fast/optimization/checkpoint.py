"""Storage of a run's state without pickles: a tree of tensors and plain values, as safetensors plus JSON.

A state is two files. The JSON file (`state.json`) names the tensor file and holds a checksum of both. The tensor file
is complete on disk before the JSON file that names it replaces its predecessor, and older tensor files are removed only
after that. So the folder holds one whole state at every moment, whenever the process is killed or the power fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "state.json"
FORMAT = 2
TENSORS_NAME = re.compile(r"state-\d+-[0-9a-f]{16}\.safetensors")
LEFTOVERS = ("state-*.safetensors*", f"{INDEX}.*.tmp")
_TENSOR = "__tensor__"
_ITEMS = "__items__"


def save(folder: Path, tree: Any, step: int) -> None:
    """Replaces the state in a folder.

    Args:
        folder: It is made if it does not exist. Only one process at a time may save in it (see `FolderLock`).
        tree: Dicts, lists, tuples, tensors, numbers, strings and None.
        step: Number of the step, which becomes part of the tensor file's name.

    Raises:
        TypeError: `tree` holds anything else.
    """
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    plain = _pack(tree, "", tensors)
    data = to_bytes(tensors)
    name = f"state-{step:06d}-{secrets.token_hex(8)}.safetensors"
    content = {"format": FORMAT, "tensors": name, "sha256": hashlib.sha256(data).hexdigest(), "state": plain}
    text = json.dumps({**content, "checksum": _checksum(content)})
    new_tensors, new_index = (folder / f"{n}.{secrets.token_hex(8)}.tmp" for n in (name, INDEX))
    _write_new(new_tensors, data)
    _write_new(new_index, text.encode())
    new_tensors.replace(folder / name)
    # The name of the tensor file must be on disk before a JSON file that refers to it is.
    _sync_folder(folder)
    new_index.replace(folder / INDEX)
    _sync_folder(folder)
    for pattern in LEFTOVERS:
        for old in folder.glob(pattern):
            if old.name != name:
                old.unlink(missing_ok=True)


def load(folder: Path) -> Any:
    """Reads the state in a folder.

    Returns:
        The tree that was saved, with lists in place of tuples and tensors on the CPU.

    Raises:
        ValueError: There is no state, it was written by version 0.1, or it does not match its checksums.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    if not (folder / INDEX).is_file():
        raise ValueError(f"resume: expected a folder with {INDEX} in it, got {str(folder)!r}; start without resume=")
    try:
        content = json.loads((folder / INDEX).read_bytes())
        if "format" not in content:
            raise ValueError("it was written by version 0.1, without checksums, and this version does not read it")
        if content["format"] != FORMAT:
            raise ValueError(f"it has the format {content['format']!r}, and this version reads {FORMAT}")
        if content.pop("checksum") != _checksum(content):
            raise ValueError(f"{INDEX} does not match its checksum")
        if not TENSORS_NAME.fullmatch(content["tensors"]):
            raise ValueError(f"{INDEX} names {content['tensors']!r}, which is not the name of a file of a run")
        data = (folder / content["tensors"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != content["sha256"]:
            raise ValueError(f"{content['tensors']} does not match its checksum")
        return _unpack(content["state"], from_bytes(data))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError, SafetensorError) as error:
        raise ValueError(
            f"resume: the state in {str(folder)!r} is damaged or foreign ({error}); start in another folder"
        ) from error


def without_index(folder: Path) -> str | None:
    """The name of a tensor file whose `state.json` has been lost, or None.

    A process that was killed while it stored its first state leaves a temporary `state.json`, and has lost nothing.
    """
    if (folder / INDEX).exists() or any(folder.glob(f"{INDEX}.*.tmp")):
        return None
    return next((path.name for path in sorted(folder.glob("state-*.safetensors"))), None)


def _checksum(content: dict[str, Any]) -> str:
    """A hash of the values of a JSON object, whatever its white space and the order of its keys are."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_new(path: Path, data: bytes) -> None:
    """Writes a file that must not exist, not even as a symbolic link, and waits until it is on disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Waits until the names of a folder's files are on disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _pack(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON can hold it; its tensors are put into `tensors`."""
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
    """The tree that `_pack` was given."""
    if isinstance(tree, list):
        return [_unpack(value, tensors) for value in tree]
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {key: _unpack(value, tensors) for key, value in tree[_ITEMS]}
    return tree


def random_state() -> dict[str, Tensor]:
    """PyTorch's global random states: the CPU's, and those of the CUDA devices if CUDA has been used."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            states[f"cuda:{i}"] = torch.cuda.get_rng_state(i)
    return states


def restore_random_state(states: dict[str, Tensor]) -> None:
    """Sets PyTorch's global random states to what `random_state` returned."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state, device)
