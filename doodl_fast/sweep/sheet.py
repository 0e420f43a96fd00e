"""The contact sheet of a sweep: one PNG file with a row for each prompt and seed, and a column for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..diffusion.images import write_whole
from .plan import RUNS
from .table import DONE, Row

if TYPE_CHECKING:
    from PIL import Image

CELL, GAP, HEAD, LABEL, MARGIN = 96, 6, 46, 168, 8
MOST_ROWS, MOST_COLUMNS = 60, 24
INK, PALE, PAPER = "#1f2328", "#d8dee4", "#ffffff"


def write_sheet(path: Path, folder: Path, rows: Sequence[Row]) -> None:
    """Writes the contact sheet.

    The first column has the pictures before, of the first method. A cell stays grey where its run is not done. Beyond
    60 rows and 24 columns the sheet ends, and says so.

    Args:
        path: The PNG file.
        folder: Of the sweep.
        rows: Of `read_rows`.
    """
    from PIL import Image, ImageDraw

    lines = list(dict.fromkeys((row["prompt"], row["seed"]) for row in rows))
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    by_place = {((row["prompt"], row["seed"]), _kind(row)): row for row in rows}
    shown, columns = lines[:MOST_ROWS], kinds[:MOST_COLUMNS]
    width = MARGIN + LABEL + (len(columns) + 1) * (CELL + GAP) + MARGIN
    height = MARGIN + HEAD + len(shown) * (CELL + GAP) + MARGIN + 14
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, kind in enumerate([("before",), *columns]):
        for line, text in enumerate(filter(None, kind)):
            draw.text((_x(number), MARGIN + 12 * line), _short(draw, text, CELL), fill=INK)
    for number, (prompt, seed) in enumerate(shown):
        top = MARGIN + HEAD + number * (CELL + GAP)
        for line, text in enumerate([*_lines(draw, prompt, LABEL - 10, 5), f"seed {seed}"]):
            draw.text((MARGIN, top + 2 + 13 * line), text, fill=INK)
        row_of = [by_place.get(((prompt, seed), kind)) for kind in columns]
        first = next((row for row in row_of if row is not None and row["status"] == DONE), None)
        for place, row in enumerate([first, *row_of]):
            name = "before.png" if place == 0 else "after.png"
            picture = None if row is None or row["status"] != DONE else _picture(folder / RUNS / row["run"] / name)
            if picture is None:
                draw.rectangle((_x(place), top, _x(place) + CELL - 1, top + CELL - 1), fill=PALE)
            else:
                sheet.paste(picture, (_x(place), top))
    left = [f"{len(lines) - len(shown)} rows"] * (len(lines) > len(shown))
    left += [f"{len(kinds) - len(columns)} columns"] * (len(kinds) > len(columns))
    if left:
        draw.text((MARGIN, height - 18), f"and {' and '.join(left)} more, in the gallery", fill=INK)
    write_whole(path, lambda file: sheet.save(file, format="PNG"))


def _kind(row: Row) -> tuple[str, str, str]:
    """What decides a run's column."""
    return row["method"], row["guide"], row["setting"]


def _x(column: int) -> int:
    """Where a column begins, in pixels."""
    return MARGIN + LABEL + column * (CELL + GAP)


def _picture(path: Path) -> Image.Image | None:
    """A picture in the size of a cell; None if there is none."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as picture:
        whole = picture.convert("RGB")
    if whole.size != (CELL, CELL):
        scale = CELL / max(whole.size)
        size = tuple(max(1, round(side * scale)) for side in whole.size)
        whole = whole.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    cell.paste(whole, ((CELL - whole.width) // 2, (CELL - whole.height) // 2))
    return cell


def _short(draw: Any, text: str, width: int) -> str:
    """The text, cut off where it is wider than so many pixels."""
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _lines(draw: Any, text: str, width: int, most: int) -> list[str]:
    """The text in lines of at most so many pixels, and at most so many lines."""
    lines: list[str] = []
    for word in text.split():
        if lines and draw.textlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_short(draw, word, width))
    return lines if len(lines) <= most else [*lines[: most - 1], _short(draw, f"{lines[most - 1]} ...", width)]
