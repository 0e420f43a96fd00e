"""The DOODL reference's own names and behaviour, for code that was written against it (docs/migration.md).

    from doodl_fast.compat import memcnn             # instead of `import memcnn`
    from doodl_fast.compat.doodl import gen           # instead of `from doodl import gen`

    from doodl_fast.compat import install             # or, before `import doodl`: swaps what it imports
    install()

`python -m doodl_fast.compat doctor FILE_OR_FOLDER` reads code and says what to change in it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import doodl, memcnn
    from .installer import install, uninstall
    from .quirks import Quirks

__all__ = ["Quirks", "doodl", "install", "memcnn", "uninstall"]

_HOMES = {"Quirks": "quirks", "install": "installer", "uninstall": "installer"}


def __getattr__(name: str) -> Any:
    # lazy, as in the package itself: asking for one name imports what it needs
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES.get(name, name)}", __name__)
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
