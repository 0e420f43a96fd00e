"""What is fuzzed: the readers of files that may come from anywhere.

A target takes any bytes, makes a file of them and reads it. It must return what the reader promises or raise the
ValueError that the reader documents. Every other exception, and every result that breaks the promise, is a fault.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import struct
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors

from doodl_fast.chain.exact.state import LatticeState
from doodl_fast.diffusion.images import open_picture
from doodl_fast.optimization import checkpoint

MOST_PIXELS = 1 << 16
"""A fuzzer makes headers of huge pictures, which take PIL's whole limit of memory for nothing."""
MOST_BYTES = 1 << 16
SIZES = {"I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "BOOL": 1, "I16": 2}
"""The bytes of a number, by the names of dtypes in safetensors files."""
DIVIDER = b"\n--tensors--\n"
"""Divides the JSON of a run's state from its tensors in the input of `run_state`."""


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        run: Reads a file of the given bytes. Returns whether they were accepted.
        seeds: Sound files, from which a fuzzer starts.
        with_valid_header: Makes of a mutated input one whose lengths and checksums are right again, so that a fuzzer
            gets past them.
    """

    run: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]
    with_valid_header: Callable[[bytes], bytes] = bytes


def picture(data: bytes) -> bool:
    """Reads a picture file."""
    limit = Image.MAX_IMAGE_PIXELS
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of odd metadata
        path = Path(folder) / "picture"
        path.write_bytes(data)
        try:
            Image.MAX_IMAGE_PIXELS = MOST_PIXELS
            image = open_picture(path)
        except ValueError:
            return False
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    assert image.dtype == torch.float32 and image.ndim == 4 and image.shape[:2] == (1, 3) and image.numel()
    assert bool(((image >= -1) & (image <= 1)).all())
    return True


def picture_seeds() -> list[bytes]:
    """Pictures of every kind that the reader knows: formats, modes, depths, orientation."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (6, 5, 4), dtype=np.uint8), "RGBA")
    deep = Image.fromarray(rng.integers(0, 65536, (6, 5), dtype=np.uint16))
    real = Image.fromarray(rng.random((6, 5), dtype=np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    kinds: list[tuple[Image.Image, str, dict[str, object]]] = [
        (colours, "PNG", {}),
        (colours.convert("RGB"), "JPEG", {"exif": exif}),
        (colours.convert("P"), "GIF", {}),
        (colours.convert("LA"), "PNG", {}),
        (colours.convert("1"), "BMP", {}),
        (colours.convert("CMYK"), "TIFF", {}),
        (colours, "WEBP", {"lossless": True}),
        (deep, "PNG", {}),
        (deep, "TIFF", {}),
        (real, "TIFF", {}),
    ]
    found = []
    for image, kind, options in kinds:
        file = io.BytesIO()
        image.save(file, kind, **options)
        found.append(file.getvalue())
    return found


def lattice_state(data: bytes) -> bool:
    """Reads the file of a state in exact arithmetic, and writes it again."""
    with tempfile.TemporaryDirectory() as folder:
        path, copy = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
        path.write_bytes(data)
        try:
            state = LatticeState.load(path)
        except ValueError:
            return False
        state.latents()
        state.save(copy)
        assert LatticeState.load(copy).equals(state)
    return True


def lattice_seeds() -> list[bytes]:
    """States of both widths, with a checksum as this version writes it and without one as version 0.2 did."""
    found = []
    for dtype, latents in ((torch.int32, "fp16"), (torch.int64, "fp32")):
        values = torch.arange(-12, 12).reshape(1, 2, 3, 4).to(dtype)
        buffers = torch.arange(96, dtype=torch.int32).reshape(4, 1, 2, 3, 4)
        metadata = {
            "format": "doodl_fast.LatticeState",
            "version": "1",
            "end": "image",
            "latents_dtype": latents,
            "units": f"{(2.0**-22).hex()} {(2.0**-21).hex()}",
            "fingerprint": "0" * 64,
        }
        tensors = {"x": values, "y": values.flip(-1).contiguous(), "x_buffer": buffers, "y_buffer": buffers.clone()}
        found.append(to_safetensors(tensors, metadata))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            path.write_bytes(found[-1])
            LatticeState.load(path).save(path)
            found.append(path.read_bytes())
    return found


def with_valid_header(data: bytes) -> bytes:
    """Returns a safetensors file whose header fits its tensors, if the header can be read.

    The header's length and the tensors' places follow from the rest, and the data are cut or filled up. The checksum is
    left out, as in files of version 0.2.
    """
    try:
        header, length = json.JSONDecoder().raw_decode(data[8:].decode("latin-1"))
        body, place = data[8 + length :].lstrip(b" "), 0
        for name, entry in header.items():
            if name == "__metadata__":
                entry.pop("checksum", None)
                continue
            size = SIZES[entry["dtype"]] * math.prod(entry["shape"])
            entry["data_offsets"] = [place, place + size]
            place += size
        if not 0 <= place < MOST_BYTES:
            return data
        text = json.dumps(header).encode("latin-1")
        return struct.pack("<Q", len(text)) + text + body[:place].ljust(place, b"\0")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return data


def run_state(data: bytes) -> bool:
    """Reads the folder of a run. The input is the JSON of the state, a divider and the tensors."""
    text, _, tensors = data.partition(DIVIDER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / checkpoint.INDEX).write_bytes(text)
        with contextlib.suppress(ValueError, TypeError, KeyError, OSError, RecursionError, AttributeError):
            stored = json.loads(text)["tensors"]
            if checkpoint.TENSORS_NAME.fullmatch(stored):
                (folder / stored).write_bytes(tensors)
        try:
            checkpoint.load(folder)
        except ValueError:
            return False
    return True


def run_seeds() -> list[bytes]:
    """The state of an optimiser, with every kind of value that a state may hold."""
    tree = {
        "step": 3,
        "losses": [1.0, 0.5, float("inf")],
        "latents": [torch.arange(6.0).reshape(1, 2, 3), torch.zeros(0, dtype=torch.float64)],
        "optimizer": {0: {"momentum": torch.ones(2), "nothing": None}, "name": "sgd", "on": True},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint.save(folder, tree, 3)
        (tensors,) = folder.glob("*.safetensors")
        return [(folder / checkpoint.INDEX).read_bytes() + DIVIDER + tensors.read_bytes()]


def with_valid_checksums(data: bytes) -> bytes:
    """Returns the input of `run_state` with both checksums as they should be, if its JSON can be read."""
    text, _, tensors = data.partition(DIVIDER)
    try:
        content = json.loads(text)
        content.pop("checksum", None)
        content["sha256"] = hashlib.sha256(tensors).hexdigest()
        checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({**content, "checksum": checksum}).encode() + DIVIDER + tensors
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


TARGETS = {
    "picture": Target(picture, picture_seeds),
    "lattice_state": Target(lattice_state, lattice_seeds, with_valid_header),
    "run_state": Target(run_state, run_seeds, with_valid_checksums),
}
