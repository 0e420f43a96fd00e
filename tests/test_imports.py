"""No modules import each other in a circle, and no package imports a private name of another one."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import doodl_fast

PACKAGE = Path(doodl_fast.__file__).parent


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions, and those under `TYPE_CHECKING`, count as well."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("doodl_fast", exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 80
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail("these modules import each other: " + " <- ".join(error.args[1]))


def test_no_package_imports_a_private_name_of_another_one():
    found = []
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            # `from ..chain.x import name` in doodl_fast/compat/y.py imports from another package; `from .x` does not
            inside = node.level and node.level < len(path.relative_to(PACKAGE).parts)
            outside = not inside and (node.level or (node.module or "").startswith("doodl_fast"))
            private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"]
            if outside and private and package != "__init__.py":
                found.append(f"{path.relative_to(PACKAGE).as_posix()}: {', '.join(private)}")
    assert not found
