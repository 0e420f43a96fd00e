"""The version, the deprecated names and the settings of the tools are the same in all files that contain them."""

from __future__ import annotations

import re
from pathlib import Path

import doodl_fast
from doodl_fast import _moved

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text()


def test_every_file_has_the_same_version():
    patterns = {
        "pyproject.toml": r'^version = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## \[(.+)\]",
    }
    found = {name: re.search(pattern, text(name), re.MULTILINE)[1] for name, pattern in patterns.items()}
    assert set(found.values()) == {doodl_fast.__version__}, found


def test_the_changelog_names_every_module_that_moved():
    rows = re.findall(r"^\| `doodl_fast\.(\S+)` \| `doodl_fast\.(\S+)` \|$", text("CHANGELOG.md"), re.MULTILINE)
    assert dict(rows) == _moved.MOVED


def test_commit_hooks_run_the_checks_of_make_check():
    checks = text("Makefile").split("\ncheck: $(READY)\n")[1].split("\n\n")[0]
    commands = [line.split("$(BIN)/")[1] for line in checks.splitlines()]
    hooks = re.findall(r"entry: (.+)$", text(".pre-commit-config.yaml"), re.MULTILINE)
    assert [hook.removesuffix(" .") for hook in hooks] == [command.removesuffix(" .") for command in commands]
