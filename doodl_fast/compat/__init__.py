"""The names and the behaviour of the DOODL reference, for code that was written for it; see docs/migration.md.

Such code can import from here:

    from doodl_fast.compat import memcnn             # instead of `import memcnn`
    from doodl_fast.compat.doodl import gen          # instead of `from doodl import gen`

Or it can stay as it is, if this comes before `import doodl`:

    from doodl_fast.compat import install
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
    """Imports a public name when it is asked for, so that each name imports only what it needs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES.get(name, name)}", __name__)
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names."""
    return sorted(__all__)
