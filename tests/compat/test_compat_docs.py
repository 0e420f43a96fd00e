"""The pages about `compat` are right about names: quirks, imports, arguments."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

from doodl_fast.compat import Quirks, memcnn
from doodl_fast.compat.doodl import SteppingLayer, gen

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("gen.md", "migration.md", "quirks.md")
QUIRKS = {field.name for field in dataclasses.fields(Quirks)}


def added_code(page: str) -> str:
    """Returns the Python code that a page tells its reader to write: whole blocks, and the added lines of diffs."""
    text = (DOCS / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    diffs = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    added = [line[1:] for block in diffs for line in block.splitlines() if line.startswith("+")]
    return "\n".join([*blocks, *added])


def test_every_quirk_has_a_row():
    named = re.findall(r"^\| `(\w+)` \|", (DOCS / "quirks.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(QUIRKS)


def test_gens_page_names_only_quirks_that_there_are():
    table = (DOCS / "gen.md").read_text().split("\n## Quirks\n")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named | {"ignored_prediction_type"} == QUIRKS


@pytest.mark.parametrize("page", PAGES)
def test_quirks_are_switched_off_by_their_names(page):
    used = re.findall(r"Quirks\((\w+)=False\)", (DOCS / page).read_text())
    assert set(used) <= QUIRKS
    assert used or page == "migration.md"


@pytest.mark.parametrize("page", ["gen.md", "migration.md"])
def test_every_import_that_a_page_tells_to_write_works(page):
    lines = re.findall(r"^ *(from doodl_fast.*)$", added_code(page), re.MULTILINE)
    lines += re.findall(r"`(from doodl_fast\S* import [\w, ]+)`", (DOCS / page).read_text())
    assert lines
    for line in lines:
        (statement,) = ast.parse(line).body
        for alias in statement.names:
            assert hasattr(importlib.import_module(statement.module), alias.name), line


def test_the_wrappers_arguments_are_those_of_the_page():
    (listed,) = re.findall(r"^`InvertibleModuleWrapper\((.+)\)`$", (DOCS / "migration.md").read_text(), re.MULTILINE)
    assert listed.replace("=", "").split(", ") == list(inspect.signature(memcnn.InvertibleModuleWrapper).parameters)


def test_arguments_that_the_pages_pass_are_there():
    known = set(inspect.signature(gen).parameters)
    calls = re.findall(r"\bgen\((.+)\)$", added_code("gen.md"), re.MULTILINE)
    assert calls
    for call in calls:
        (expression,) = ast.parse(f"gen({call})").body
        assert {keyword.arg for keyword in expression.value.keywords} <= known
    assert "def predict_noise(self, latent, t" in added_code("migration.md")
    assert list(inspect.signature(SteppingLayer.predict_noise).parameters)[:3] == ["self", "latent", "t"]
