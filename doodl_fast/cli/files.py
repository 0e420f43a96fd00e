"""Writes files as a whole: each is written under a temporary name and then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_picture(path: Path, images: Tensor, frames: int | None = None) -> None:
    """Writes the first of images (B, 3, H, W) in [-1, 1] as a PNG file, or the first `frames` side by side."""
    from ..diffusion import images as pictures

    pictures.write_picture(path, images[: frames or 1])


def write_animation(path: Path, frames: Tensor) -> None:
    """Writes the frames (F, 3, H, W) of a video, in [-1, 1], as an animated picture."""
    import torch

    from ..diffusion.videos import VideoTensor

    VideoTensor(frames.as_subclass(torch.Tensor).unsqueeze(0)).save(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as a JSON file."""
    replace(path, lambda partial: partial.write_text(json.dumps(value, indent=1) + "\n"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary name beside `path` and renames it, so that `path` never holds half a file.

    The name cannot be guessed, so that no other process waits there with a symbolic link. After an error the temporary
    file is deleted.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder, which is renamed to `path` at the end, or deleted after an error.

    `path` must not exist, or be an empty folder.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
