"""Where modules are: which may import which, which names must differ, and the old names that still work."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import doodl_fast
from doodl_fast import _moved

PACKAGE = Path(doodl_fast.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "doodl_fast.") if info.ispkg]


def test_packages_import_only_what_lies_below_them():
    pytest.importorskip("importlinter")
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_programs_and_solvers_know_no_network():
    """A program is a list of numbers, so neither it nor the package of the operators may need diffusers."""
    for path in [
        PACKAGE / "chain" / "program.py",
        *(PACKAGE / "ops").rglob("*.py"),
        *(PACKAGE / "chain").rglob("*.py"),
    ]:
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not imported & {"diffusers", "transformers"}, path
        assert path.name != "program.py" or "torch" not in imported


@pytest.mark.parametrize("package", ["doodl_fast", *PACKAGES])
def test_no_public_name_is_also_a_module(package):
    """The one that is imported last would hide the other: `doodl_fast.compat.install` was a function, then a module."""
    module = importlib.import_module(package)
    modules = {info.name for info in pkgutil.iter_modules(module.__path__)}
    for name in modules & set(getattr(module, "__all__", ())):
        assert getattr(module, name) is importlib.import_module(f"{package}.{name}"), name


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_old_names_work_and_say_what_is_new(old):
    code = (
        "import warnings, importlib\n"
        "warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        f"    old = importlib.import_module('doodl_fast.{old}')\n"
        f"new = importlib.import_module('doodl_fast.{_moved.MOVED[old]}')\n"
        "assert old is new and new.__spec__.name == new.__name__, (old, new.__spec__)\n"
        f"assert any('doodl_fast.{_moved.MOVED[old]}' in str(w.message) for w in caught), caught\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", doodl_fast.__all__)
def test_every_public_name_is_there_with_a_docstring(name):
    value = getattr(doodl_fast, name)
    assert value.__doc__ and name in dir(doodl_fast)


def test_the_names_of_the_first_version_are_still_there():
    names = (
        "EDICT Chain Decoder Denoiser LatticeState Result Reversibility Schedule StepInfo UpdateSettings backend "
        "check_reversibility encode_prompt guidance ops optimize profile shapes"
    )
    assert set(names.split()) <= set(doodl_fast.__all__)
    with pytest.raises(AttributeError, match="module 'doodl_fast' has no attribute 'nothing'"):
        doodl_fast.nothing  # noqa: B018


def test_importing_the_package_loads_no_library_beyond_torch():
    code = (
        "import sys, doodl_fast\n"
        "loaded = {'diffusers', 'transformers', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "doodl_fast.EDICT, doodl_fast.Auto, doodl_fast.ImageTensor, doodl_fast.optimize\n"
        "loaded = {'diffusers', 'transformers', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
