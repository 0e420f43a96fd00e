"""Prints the requirements of one of the extras in pyproject.toml, one a line, for `pip install -r`.

    python .ci/requirements.py docs

An extra itself would bring the package and with it torch, which building the site does not need.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def requirements(extra: str) -> list[str]:
    """Returns the requirements of an extra. Raises SystemExit if there is no such extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if extra not in extras:
        raise SystemExit(f"extra: expected one of {', '.join(extras)}, got {extra!r}")
    return list(extras[extra])


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
