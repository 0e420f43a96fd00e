"""Fails where a file has more than 400 lines, or a function more than 60 lines of body.

The signature and the docstring of a function do not count: a public function may document its arguments at length.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the end of the function."""
    body = function.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def too_large(path: Path) -> list[str]:
    text = path.read_text()
    name = path.relative_to(ROOT)
    lines = text.count("\n")
    found = [f"{name}: {lines} lines, expected at most {LONGEST_FILE}"] if lines > LONGEST_FILE else []
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    found += [
        f"{name}:{node.lineno}: {node.name} has {body_lines(node)} lines, expected at most {LONGEST_FUNCTION}"
        for node in functions
        if body_lines(node) > LONGEST_FUNCTION
    ]
    return found


def main() -> int:
    folders = ("doodl_fast", "bench", "examples", "fuzz", "tests", ".ci")
    files = [ROOT / "setup.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]
    found = [line for path in files for line in too_large(path)]
    print("\n".join(found) or f"{len(files)} files, none over {LONGEST_FILE} lines")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
