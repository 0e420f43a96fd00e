"""The pages about `compat` keep up with it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from doodl_fast.compat import Quirks

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_every_quirk_has_a_row():
    named = re.findall(r"^\| `(\w+)` \|", (DOCS / "quirks.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(Quirks))


def test_every_migration_changes_five_lines_or_fewer():
    blocks = re.findall(r"```diff\n(.*?)```", (DOCS / "migration.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        signs = [line[0] for line in block.splitlines()]
        assert max(signs.count("+"), signs.count("-")) <= 5
