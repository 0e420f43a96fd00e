"""Wheels that are built with and without a compiler: their tags, their contents, and that they work."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "_native_build.json")
NOWHERE = str(Path(os.sep, "nowhere", "c++"))


@pytest.fixture
def sources(tmp_path) -> Path:
    """Returns a copy of the sources, without anything that was built beside them."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("setuptools is not installed")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than 77")
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("doodl_fast", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=BUILT)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def run(folder: Path, *command: str | Path, **changes: str) -> str:
    """Returns what a Python command prints in a folder, with no variables of this package except those given."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DOODL_FAST_")}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=folder, env={**environment, **changes}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(sources: Path, out: Path, **environment: str) -> zipfile.ZipFile:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-w", out)
    run(sources, "-m", "pip", "wheel", *options, ".", DOODL_FAST_NO_CUDA="1", **environment)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


def report(wheel: zipfile.ZipFile) -> dict[str, str]:
    return json.loads(wheel.read("doodl_fast/_native_build.json"))


def libraries(wheel: zipfile.ZipFile) -> list[str]:
    return [name for name in wheel.namelist() if name.endswith((".so", ".pyd", ".dylib"))]


def backend_of(wheel: zipfile.ZipFile, folder: Path) -> str:
    """Returns the backend that computes on the CPU in an unpacked wheel."""
    wheel.extractall(folder)
    code = "import doodl_fast; from doodl_fast import ops; print(doodl_fast.__file__); print(ops.resolve('cpu'))"
    where, name = run(folder, "-c", code, PYTHONPATH=str(folder)).splitlines()
    assert Path(where).is_relative_to(folder)
    return name


def check_package(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for path in [*(ROOT / "doodl_fast").rglob("*.py"), *(ROOT / "doodl_fast" / "shapes" / "weights").rglob("*")]:
        assert path.is_dir() or path.relative_to(ROOT).as_posix() in names
    assert "doodl_fast/py.typed" in names
    assert not any(name.startswith(("tests/", "bench/", "csrc/")) for name in names)


def check_pure(wheel: zipfile.ZipFile, why: str, folder: Path) -> None:
    assert wheel.filename.endswith("-py3-none-any.whl") and not libraries(wheel)
    assert why in report(wheel)["cpu"] and report(wheel)["cuda"] != "built"
    check_package(wheel)
    assert backend_of(wheel, folder) == "eager"


@pytest.mark.parametrize(
    ("environment", "why"),
    [({"DOODL_FAST_NO_NATIVE": "1"}, "DOODL_FAST_NO_NATIVE is set"), ({"CC": NOWHERE, "CXX": NOWHERE}, NOWHERE)],
    ids=["switched off", "no compiler"],
)
def test_without_native_kernels(sources, tmp_path, environment, why):
    """The installation goes on in pure Python, and says what is missing."""
    check_pure(build(sources, tmp_path / "out", **environment), why, tmp_path / "unpacked")


def test_with_a_compiler_and_then_without(sources, tmp_path):
    """One wheel serves every Python from 3.10 on. A pure wheel does not contain the library of an earlier build."""
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    built = build(sources, tmp_path / "out")
    assert report(built) == {"cpu": "built", "cuda": "DOODL_FAST_NO_CUDA is set"}
    assert re.search(r"-cp310-abi3-[^-]+\.whl$", built.filename)
    assert [Path(name).stem for name in libraries(built)] in (["_native.abi3"], ["_native"])
    check_package(built)
    assert backend_of(built, tmp_path / "unpacked") == "native"
    wheel = build(sources, tmp_path / "pure", DOODL_FAST_NO_NATIVE="1")
    check_pure(wheel, "DOODL_FAST_NO_NATIVE is set", tmp_path / "unpacked too")
    left = sources / libraries(built)[0]
    left.touch()
    run(sources, "setup.py", "build_ext", "--inplace", DOODL_FAST_NO_NATIVE="1")
    assert not left.exists()
