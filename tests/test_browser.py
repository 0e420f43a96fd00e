"""Galleries in a headless Chromium, and that the check of pages in a browser finds what is wrong.

They need the package playwright, in this environment or in the one of `make docs-browser`, and a Chromium.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from doodl_fast.sweep.gallery import write_gallery

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / ".ci" / "check_browser.py"
OTHER = ROOT / ".venv-browser" / "bin" / "python"
PYTHON = sys.executable if importlib.util.find_spec("playwright") else str(OTHER)


def check(path: Path, **environment: str) -> tuple[int, str]:
    """Returns the exit status of the check, and what it prints."""
    done = subprocess.run(
        [PYTHON, str(SCRIPT), str(path)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def browser() -> None:
    """Skips where there is nothing to look with."""
    if not Path(PYTHON).exists():
        pytest.skip("needs the package playwright: `pip install playwright`, or `make docs-browser`")
    spec = importlib.util.spec_from_file_location("check_browser", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.browser_path() is None:
        pytest.skip("needs a Chromium: set CHROMIUM to its path")


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """The page of three runs that are done, one that failed, and one that waits."""
    rows = []
    for number, status in enumerate(["done", "done", "done", "failed", "pending"]):
        place = tmp_path / "runs" / f"run{number}"
        place.mkdir(parents=True)
        for shade, name in enumerate(["before", "after", "best"]):
            Image.new("RGB", (64, 64), (60 * shade, 50, 40 * number)).save(place / f"{name}.png")
        done = status == "done"
        row = {"run": f"run{number}", "prompt": "a dog", "seed": number, "guide": "g", "method": "m", "setting": ""}
        row |= {"status": status, "error": "out of memory" if status == "failed" else "", "timing": {}}
        row |= {"losses": [1.0, 0.75, 0.5 - number] if done else [], "measures": {"right": 1.0} if done else {}}
        row |= {"loss_before": 1.0, "loss_after": 0.5 - number, "loss_best": 0.5 - number} if done else {}
        row |= {"best_step": 2, "steps": 2, "distance": 0.2 * number} if done else {}
        rows.append(row)
    path = tmp_path / "gallery.html"
    write_gallery(path, tmp_path, rows)
    return path


def test_a_gallery_sorts_searches_and_shows_its_pictures(browser: None, gallery: Path) -> None:
    status, printed = check(gallery)
    assert status == 0 and "nothing is wrong" in printed, printed


FAULTS = [
    ("sign * (typeof", "(typeof", r"sorting by 'loss_after', down, gives"),
    ("--ink: #e6edf3", "--ink: #30363d", r"dark: .* has a contrast of 1\."),
    ("h1 { font-size: 17px;", "h1 { font-size: 17px; min-width: 900px;", "390 pixels, light: is 9.. pixels wide"),
    ('"use strict";', '"use strict"; console.error("lost");', "console: lost"),
    (
        '    cell.append(element("figure"',
        '    if (i) cell.append(element("figure"',
        r"row 0 has the pictures \['after', 'best'\]",
    ),
    ("row.losses.length > 1 ? [curve", "row.losses.length > 9 ? [curve", "row 0 has 0 curves"),
    ("state.search = event.target.value", "state.search = ''", r"the search finds \[5, 5, 5\] runs"),
    ('http-equiv="Content-Security-Policy"', 'name="nothing"', "asks for http://127.0.0.1:9/a.png"),
    ("<style>", '<img src="http://127.0.0.1:9/a.png"><style>', "could not load http://127.0.0.1:9/a.png"),
]
"""What is put in the place of what in a gallery, and what the check has to say about it. Nothing listens at port 9."""


def test_what_is_wrong_is_found(browser: None, gallery: Path) -> None:
    text = gallery.read_text(encoding="utf-8")
    for old, new, _ in FAULTS:
        assert old in text
        text = text.replace(old, new)
    gallery.write_text(text, encoding="utf-8")
    status, printed = check(gallery)
    assert status == 1
    assert not [problem for _, _, problem in FAULTS if not re.search(problem, printed)], printed


def test_a_browser_that_does_not_start_is_named(browser: None, gallery: Path) -> None:
    with pytest.raises(AssertionError, match=f"CHROMIUM: expected a Chromium that starts, got {sys.executable}:"):
        check(gallery, CHROMIUM=sys.executable)


def test_without_a_browser_it_says_so_and_ends_well() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "site"], capture_output=True, text=True, env={"PATH": "", "LANG": "C.UTF-8"}
    )
    assert done.returncode == 0 and "not checked: there is no Chromium here" in done.stdout
