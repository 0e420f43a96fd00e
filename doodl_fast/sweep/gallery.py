"""The gallery of a sweep: one HTML page with all pictures, losses and measures in it.

The page needs no server and loads nothing. Small pictures are in it as they are, larger ones as thumbnails; they link
to the files beside it. A sweep of so many runs that the page would be too large has links to the files alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from .files import finite, write_bytes
from .plan import RUNS
from .table import DONE, NUMBERS, Row, measure_names

TEMPLATE, PLACE = "gallery.html", "/*DATA*/"
THUMBNAIL = 128
"""The longer side of a picture in pixels up to which it is in the page as it is, and that of a thumbnail."""
MOST_BYTES = 48 * 2**20
MOST_POINTS = 60
PICTURES = ("before", "after", "best")
TEXTS = ("run", "prompt", "seed", "guide", "method", "setting", "status", "error")


def write_gallery(path: Path, folder: Path, rows: Sequence[Row], most_bytes: int = MOST_BYTES) -> None:
    """Writes the gallery.

    Args:
        path: The HTML file, which must be in `folder` for its links to hold.
        folder: Of the sweep.
        rows: Of `read_rows`.
        most_bytes: How many bytes of pictures are in the page. The pictures of all further runs are linked to.
    """
    images = _Images(most_bytes)
    entries, measures = [], measure_names(rows)
    for row in rows:
        entry: dict[str, Any] = {name: row[name] for name in TEXTS if row[name] != ""}
        entry["numbers"] = [row.get(name) for name in NUMBERS] + [row["measures"].get(name) for name in measures]
        entry["losses"] = [float(f"{loss:.5g}") for loss in _thinned(row["losses"])]
        if row["status"] == DONE:
            names = [f"{RUNS}/{row['run']}/{picture}.png" for picture in PICTURES]
            entry["images"] = [images.add(folder / name, name) for name in names]
        entries.append(entry)
    data = {"columns": [*NUMBERS, *measures], "rows": entries, "images": images.sources}
    text = json.dumps(finite(data), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    page = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    write_bytes(path, page.replace(PLACE, text, 1).encode())


class _Images:
    """The pictures of the page, each of them once, as before a run all methods have the same one.

    Args:
        most_bytes: How many bytes are in the page.
    """

    def __init__(self, most_bytes: int) -> None:
        self.sources: list[str] = []
        self._numbers: dict[bytes, int] = {}
        self._left = most_bytes

    def add(self, path: Path, link: str) -> int | None:
        """The number of a picture in `sources`; None if there is no such file."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        key = hashlib.sha256(data).digest()
        if key not in self._numbers:
            kind, small = _thumbnail(data)
            is_in = len(small) <= self._left
            self._left -= len(small) if is_in else 0
            source = f"data:image/{kind};base64,{base64.b64encode(small).decode()}" if is_in else link
            self._numbers[key] = len(self.sources)
            self.sources.append(source)
        return self._numbers[key]


def _thumbnail(data: bytes) -> tuple[str, bytes]:
    """A small picture as it is, and of a larger one a thumbnail, with the name of the format."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:  # reads the size alone
        if max(picture.size) <= THUMBNAIL:
            return "png", data
        small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    return "jpeg", buffer.getvalue()


def _thinned(losses: Sequence[float | None]) -> list[float]:
    """At most so many of the losses as a small curve can show, with the first and the last one."""
    known = [loss for loss in losses if loss is not None]
    if len(known) <= MOST_POINTS:
        return known
    return [known[round(number * (len(known) - 1) / (MOST_POINTS - 1))] for number in range(MOST_POINTS)]
