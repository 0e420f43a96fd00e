"""CONTRIBUTING.md names every target of the Makefile. Its recipes pass their own tests in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```python\n# file: (\S+)\n(.*?)```", re.DOTALL)


def recipes() -> dict[str, dict[str, str]]:
    """Returns the files of each recipe, by the last word of its heading."""
    parts = re.split(r"^## How to add an? (\w+)$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)[1:]
    return {name: dict(BLOCK.findall(text)) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def test_it_names_every_target_of_the_makefile() -> None:
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    named = re.findall(r"^    make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(targets[1].split())


def test_there_are_three_recipes_each_with_a_test():
    assert set(recipes()) == {"loss", "solver", "op"}
    for files in recipes().values():
        assert [path.split("/")[0] for path in files] == ["doodl_fast", "tests"]
        assert not any((ROOT / path).exists() for path in files)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_passes_its_own_tests(name, tmp_path):
    shutil.copytree(
        ROOT / "doodl_fast", tmp_path / "doodl_fast", ignore=shutil.ignore_patterns("weights", "__pycache__")
    )
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    files = recipes()[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    test = next(path for path in files if path.startswith("tests/"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), test]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
