"""Everything that is specific to diffusion models: networks, noise schedules, prompts, pipelines and pictures."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "EDICT":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "doodl_fast.diffusion.EDICT has moved to doodl_fast.EDICT; the old name will go in version 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    return importlib.import_module("doodl_fast").EDICT
