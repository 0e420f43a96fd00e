"""doodl_fast: exact, memory-lean gradients through whole diffusion chains, for DOODL (arXiv 2303.13703)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import guidance, ops, shapes
    from .chain import Chain
    from .denoiser import Denoiser
    from .diffusion import EDICT
    from .doodl import Result, StepInfo, optimize
    from .latents import UpdateSettings
    from .lattice_state import LatticeState
    from .ops import backend
    from .pipeline import Decoder, encode_prompt
    from .profiling import profile
    from .reversibility import Reversibility, check_reversibility
    from .schedule import Schedule

__all__ = [
    "EDICT",
    "Chain",
    "Decoder",
    "Denoiser",
    "LatticeState",
    "Result",
    "Reversibility",
    "Schedule",
    "StepInfo",
    "UpdateSettings",
    "backend",
    "check_reversibility",
    "encode_prompt",
    "guidance",
    "ops",
    "optimize",
    "profile",
    "shapes",
]

_HOMES = {
    "Chain": "chain",
    "Decoder": "pipeline",
    "Denoiser": "denoiser",
    "EDICT": "diffusion",
    "LatticeState": "lattice_state",
    "Result": "doodl",
    "Reversibility": "reversibility",
    "Schedule": "schedule",
    "StepInfo": "doodl",
    "UpdateSettings": "latents",
    "backend": "ops",
    "check_reversibility": "reversibility",
    "encode_prompt": "pipeline",
    "optimize": "doodl",
    "profile": "profiling",
}


def __getattr__(name: str) -> Any:
    # lazy, so that `import doodl_fast` costs nothing beyond torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES.get(name, name)}", __name__)
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
