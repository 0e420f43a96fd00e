"""How a sweep writes files: each appears under its name when it is complete."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from ..diffusion.images import write_whole


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file as a whole."""
    write_whole(path, lambda file: file.write(data))


def write_json(path: Path, value: Any) -> None:
    """Writes a value as a JSON file, as a whole. Numbers that are not finite are written as null."""
    write_bytes(path, (json.dumps(finite(value), indent=1) + "\n").encode())


def remove_partial(folder: Path, older_than: float | None = None) -> None:
    """Removes the unfinished files that processes have left in a folder which were killed while they wrote them.

    Args:
        folder: The folder.
        older_than: How many seconds old a file must be, where other processes may be writing; None for any age.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if older_than is None or time.time() - path.stat().st_mtime > older_than:
                path.unlink()


def finite(value: Any) -> Any:
    """The value with None in the place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
