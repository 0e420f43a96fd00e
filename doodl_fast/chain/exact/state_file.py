"""The file of a `LatticeState`: how it is written, and how a damaged one is told from a sound one."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ops.lattice_coupling_op import limit
from .arithmetic import DTYPES

FORMAT, VERSION = "doodl_fast.LatticeState", "1"
ENDS = ("noise", "image")
TENSORS = ("x", "y", "x_buffer", "y_buffer")
LATENT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
REQUIRED = frozenset({"format", "version", "end", "latents_dtype", "units", "fingerprint"})
CHECKSUM = "checksum"
"""The metadata's key for a SHA-256 of all the rest. Files of version 0.2 have none and are read all the same."""


def write_fields(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Writes a state's fields, by name; see `LatticeState.save`."""
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "end": fields["end"],
        "latents_dtype": next(name for name, dtype in LATENT_DTYPES.items() if dtype == fields["latents_dtype"]),
        "units": " ".join(unit.hex() for unit in fields["units"]),
        "fingerprint": fields["fingerprint"],
    }
    tensors = {name: fields[name].detach().cpu().contiguous().clone() for name in TENSORS}
    save_file(tensors, os.fspath(path), {**metadata, CHECKSUM: _checksum(metadata, tensors)})


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a state's fields, by name; see `LatticeState.load`."""
    name = os.fspath(path)
    metadata, tensors = _read(name)
    said = metadata.get("format"), metadata.get("version")
    if said != (FORMAT, VERSION):
        raise ValueError(f"path: expected a {FORMAT} of version {VERSION}, got {said[0]} of version {said[1]}")
    try:
        return _checked_fields(metadata, tensors)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"path: {name} is a damaged LatticeState: {error}") from error


def _read(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file."""
    from safetensors import safe_open

    if Path(name).exists() and not Path(name).is_file():  # Reading a pipe could wait for ever.
        raise ValueError(f"path: expected a file, got {name}, which is a folder or a device")
    if Path(name).is_file() and not Path(name).stat().st_size:
        raise ValueError(f"path: {name} is not a safetensors file (it is empty)")
    try:
        with safe_open(name, "pt") as file:  # type: ignore[no-untyped-call]
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # safetensors and torch have many errors for what they cannot make sense of in a damaged header.
        raise ValueError(f"path: {name} is not a safetensors file ({error})") from error


def _checked_fields(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a state from a file's content. Raises ValueError or OverflowError, saying what is wrong with it."""
    _check_tensors(tensors)
    missing, unknown = REQUIRED - set(metadata), set(metadata) - REQUIRED - {CHECKSUM}
    if missing or unknown:
        wrong = [f"without {', '.join(sorted(missing))}"] if missing else []
        wrong += [f"with {', '.join(map(repr, sorted(unknown)))}"] if unknown else []
        raise ValueError(f"expected the metadata {', '.join(sorted(REQUIRED))}, got one {' and '.join(wrong)}")
    units = tuple(float.fromhex(unit) for unit in metadata["units"].split())
    if len(units) != 2 or not all(math.isfinite(unit) and unit for unit in units):
        raise ValueError(f"units: expected two finite numbers that are not 0, got {metadata['units']!r}")
    end, dtype = metadata["end"], metadata["latents_dtype"]
    if end not in ENDS:
        raise ValueError(f"end: expected one of {ENDS}, got {end!r}")
    if dtype not in LATENT_DTYPES:
        raise ValueError(f"{dtype!r} is none of the latents' dtypes {', '.join(LATENT_DTYPES)}")
    rest = {key: value for key, value in metadata.items() if key != CHECKSUM}
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(rest, tensors):
        raise ValueError("its checksum does not match its content; write it anew, or take a copy that is intact")
    others = {"end": end, "latents_dtype": LATENT_DTYPES[dtype], "fingerprint": metadata["fingerprint"]}
    return {**tensors, **others, "units": units}


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless these are the tensors of a state within the lattice's range."""
    if set(tensors) != set(TENSORS):
        raise ValueError(f"expected the tensors {', '.join(TENSORS)}, got {', '.join(sorted(tensors)) or 'none'}")
    x, y, x_buffer, y_buffer = (tensors[name] for name in TENSORS)
    if x.dtype not in DTYPES.values() or y.dtype != x.dtype or y.shape != x.shape:
        raise ValueError(f"expected x and y of int32 or int64 alike, got {x.dtype} {x.shape} and {y.dtype} {y.shape}")
    if x.ndim < 2:
        raise ValueError(f"expected x and y of shape (B, C, ...), got {tuple(x.shape)}")
    if any(bool((n.abs() > limit(n.dtype)).any()) or bool((n == torch.iinfo(n.dtype).min).any()) for n in (x, y)):
        raise ValueError("expected x and y in the lattice's range")
    words = x_buffer.shape[0] if x_buffer.ndim else 0
    for buffer in (x_buffer, y_buffer):
        shape = (words, *x.shape)
        if buffer.dtype != torch.int32 or not words or buffer.shape != shape or bool((buffer < 0).any()):
            raise ValueError(
                f"expected buffers of int32 >= 0, (words, *{tuple(x.shape)}), got {buffer.dtype} {tuple(buffer.shape)}"
            )


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of everything that a state is made of."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in TENSORS:
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
