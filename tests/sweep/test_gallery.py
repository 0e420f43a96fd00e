"""The gallery and the contact sheet: all runs are in them, nothing is loaded from elsewhere, texts cannot break out."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from doodl_fast.sweep.gallery import write_gallery
from doodl_fast.sweep.sheet import CELL, GAP, HEAD, LABEL, MARGIN, MOST_ROWS, write_sheet

EVIL = '</script><script>alert(1)</script><img src="http://example.org/a.png"> & "quotes"'


def row(folder: Path, number: int, **changes: Any) -> dict[str, Any]:
    """A run that is done, with pictures of its own."""
    name = f"run{number}"
    place = folder / "runs" / name
    place.mkdir(parents=True)
    size = changes.pop("size", (64, 64))
    for shade, picture in ((200, "before"), (10 * number, "after"), (10 * number, "best")):
        Image.new("RGB", size, (shade, 50, 90)).save(place / f"{picture}.png")
    losses = [1.0, 0.75, 0.123456789]
    made = {"run": name, "prompt": "a dog", "seed": number, "guide": "g", "method": "m", "setting": "", "error": ""}
    made |= {"status": "done", "losses": losses, "measures": {"right": 1.0}, "timing": {}, "loss_before": 1.0}
    made |= {"loss_after": 0.123456789, "loss_best": 0.1, "best_step": 2, "steps": 2, "distance": 0.2}
    return {**made, **changes}


class Page(html.parser.HTMLParser):
    """Collects what a page would load, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.loaded += [given[name] for name in ("src", "href", "srcset", "data") if name in given]
        self._in_data = given.get("id") == "data"

    def handle_data(self, data: str) -> None:
        self.data += data if self._in_data else ""

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False


def page(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[Page, dict[str, Any], str]:
    write_gallery(folder / "gallery.html", folder, rows, **options)
    text = (folder / "gallery.html").read_text(encoding="utf-8")
    found = Page(text)
    return found, json.loads(found.data), text


def test_the_page_has_every_run_and_loads_nothing(tmp_path: Path) -> None:
    rows = [row(tmp_path, number) for number in range(3)]
    rows[1]["prompt"] = EVIL
    rows.append({**row(tmp_path, 3), "status": "failed", "error": EVIL, "losses": [], "loss_after": None})
    found, data, text = page(tmp_path, rows)
    assert found.loaded == [] and found.tags.count("script") == 2 and "alert(1)</script>" not in text
    assert "default-src 'none'" in text and not re.search(r"(src|href)=[\"']?https?:|url\(|@import", text)
    assert [entry["run"] for entry in data["rows"]] == [f"run{number}" for number in range(4)]
    assert data["rows"][1]["prompt"] == EVIL and data["rows"][3]["error"] == EVIL
    assert data["columns"][1] == "loss_after" and data["rows"][0]["numbers"][1] == 0.123456789
    assert data["rows"][0]["losses"] == [1.0, 0.75, 0.12346]


def test_pictures_are_in_the_page_once_each(tmp_path: Path) -> None:
    rows = [row(tmp_path, number) for number in range(3)]
    _, data, _ = page(tmp_path, rows)
    assert len(data["images"]) == 4  # one before, which all share, and three after, which are the best ones too
    assert [entry["images"] for entry in data["rows"]] == [[0, 1, 1], [0, 2, 2], [0, 3, 3]]
    kind, _, text = data["images"][1].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(text) == (tmp_path / "runs/run0/after.png").read_bytes()


def test_large_pictures_are_thumbnails_and_too_many_are_links(tmp_path: Path) -> None:
    rows = [row(tmp_path, number, size=(512, 256)) for number in range(2)]
    _, data, _ = page(tmp_path, rows)
    thumbnail = Image.open(io.BytesIO(base64.b64decode(data["images"][0].partition(",")[2])))
    assert thumbnail.size == (128, 64) and thumbnail.format == "JPEG"
    assert abs(int(np.asarray(thumbnail)[30, 60, 0]) - 200) < 4
    _, data, _ = page(tmp_path, rows, most_bytes=0)
    assert data["images"] == ["runs/run0/before.png", "runs/run0/after.png", "runs/run1/after.png"]
    (tmp_path / "runs/run1/after.png").unlink()
    _, data, _ = page(tmp_path, rows, most_bytes=0)
    assert data["rows"][1]["images"][1] is None


def test_numbers_that_are_not_finite_and_long_curves(tmp_path: Path) -> None:
    rows = [row(tmp_path, 0, losses=[float(number) for number in range(1000)], loss_after=float("nan"))]
    _, data, text = page(tmp_path, rows)
    assert "NaN" not in text.split('id="data"')[1].split("</script>")[0]
    assert data["rows"][0]["numbers"][1] is None
    losses = data["rows"][0]["losses"]
    assert len(losses) == 60 and (losses[0], losses[-1]) == (0, 999)


def cell(sheet: Any, line: int, column: int) -> list[int]:
    """The colour in the middle of a cell of the contact sheet."""
    x = MARGIN + LABEL + column * (CELL + GAP) + CELL // 2
    y = MARGIN + HEAD + line * (CELL + GAP) + CELL // 2
    return [int(value) for value in sheet[y, x]]


def test_the_contact_sheet_has_a_row_for_each_prompt_and_seed(tmp_path: Path) -> None:
    rows = [row(tmp_path, number, seed=number // 2, method="ab"[number % 2]) for number in range(4)]
    rows[3]["status"] = "pending"
    write_sheet(tmp_path / "sheet.png", tmp_path, rows)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert [cell(sheet, line, 0) for line in (0, 1)] == [[200, 50, 90]] * 2
    assert [cell(sheet, 0, column) for column in (1, 2)] == [[0, 50, 90], [10, 50, 90]]
    assert cell(sheet, 1, 1) == [20, 50, 90] and cell(sheet, 1, 2) == [0xD8, 0xDE, 0xE4]


def test_a_long_contact_sheet_ends(tmp_path: Path) -> None:
    rows = [row(tmp_path, number, prompt=f"{number} " + 20 * "long words ") for number in range(3)]
    rows += [{**rows[0], "seed": seed} for seed in range(100, 200)]
    write_sheet(tmp_path / "sheet.png", tmp_path, rows)
    assert Image.open(tmp_path / "sheet.png").height < (MOST_ROWS + 2) * (CELL + GAP)


@pytest.mark.parametrize("size", [(64, 64), (200, 20)])
def test_both_are_the_same_when_they_are_written_again(tmp_path: Path, size: tuple[int, int]) -> None:
    rows = [row(tmp_path, number, size=size) for number in range(2)]
    contents = []
    for _ in range(2):
        write_sheet(tmp_path / "sheet.png", tmp_path, rows)
        write_gallery(tmp_path / "gallery.html", tmp_path, rows)
        contents.append([(tmp_path / name).read_bytes() for name in ("sheet.png", "gallery.html")])
    assert contents[0] == contents[1]
