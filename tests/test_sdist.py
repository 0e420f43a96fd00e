"""The source distribution: everything that a build, the tests and the site need, and nothing that was built here."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    """Returns the paths in a source distribution, relative to its root."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than 77")
    folder = tmp_path_factory.mktemp("sdist")
    (folder / "info").mkdir()
    command = ["setup.py", "-q", "egg_info", "--egg-base", str(folder / "info"), "sdist", "-d", str(folder)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def test_it_has_every_source(names):
    folders = ("csrc", "doodl_fast", "tests", "docs", "examples", ".ci")
    skipped = {"__pycache__", "out"}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()):
        inside = path.relative_to(ROOT)
        if skipped & set(inside.parts) or path.name.startswith("_native") or path.suffix in (".so", ".pyd"):
            continue
        assert inside.as_posix() in names
    assert {"csrc/cuda.cu", "setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "mkdocs.yml"} <= names


def test_it_has_nothing_that_was_built_here(names):
    built = [name for name in names if "_native" in os.path.basename(name) and not name.startswith(("tests/", "csrc/"))]
    assert not built
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc"))]
