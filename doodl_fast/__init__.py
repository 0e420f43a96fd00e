"""doodl_fast: exact, memory-lean gradients through whole diffusion chains, for DOODL (arXiv 2303.13703)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved

__version__ = "0.2.0"

_moved.install()

if TYPE_CHECKING:
    from . import guidance, ops, shapes
    from .chain.chain import Chain
    from .chain.exact.state import LatticeState
    from .chain.memory.profiling import profile
    from .chain.memory.strategies import Auto, Checkpoint, Naive, Reversible
    from .chain.reversibility import Reversibility, check_reversibility
    from .diffusion.denoiser import Denoiser
    from .diffusion.pipeline import Decoder, encode_prompt
    from .diffusion.schedule import Schedule
    from .diffusion.tracing import SamplerSteps
    from .ops import backend
    from .optimization.loop import Result, StepInfo, optimize
    from .optimization.update import UpdateSettings
    from .solvers.bdia import BDIA
    from .solvers.ddim import DDIM
    from .solvers.edict import EDICT
    from .solvers.obelm import OBELM
    from .solvers.sampler import LCM, DPMSolver, Sampler, UniPC

__all__ = [
    "BDIA",
    "DDIM",
    "EDICT",
    "LCM",
    "OBELM",
    "Auto",
    "Chain",
    "Checkpoint",
    "DPMSolver",
    "Decoder",
    "Denoiser",
    "LatticeState",
    "Naive",
    "Result",
    "Reversibility",
    "Reversible",
    "Sampler",
    "SamplerSteps",
    "Schedule",
    "StepInfo",
    "UniPC",
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
    "Auto": "chain.memory.strategies",
    "Chain": "chain.chain",
    "Checkpoint": "chain.memory.strategies",
    "Decoder": "diffusion.pipeline",
    "Denoiser": "diffusion.denoiser",
    "BDIA": "solvers.bdia",
    "DDIM": "solvers.ddim",
    "EDICT": "solvers.edict",
    "OBELM": "solvers.obelm",
    "DPMSolver": "solvers.sampler",
    "LCM": "solvers.sampler",
    "Sampler": "solvers.sampler",
    "SamplerSteps": "diffusion.tracing",
    "UniPC": "solvers.sampler",
    "LatticeState": "chain.exact.state",
    "Naive": "chain.memory.strategies",
    "Result": "optimization.loop",
    "Reversibility": "chain.reversibility",
    "Reversible": "chain.memory.strategies",
    "Schedule": "diffusion.schedule",
    "StepInfo": "optimization.loop",
    "UpdateSettings": "optimization.update",
    "backend": "ops",
    "check_reversibility": "chain.reversibility",
    "encode_prompt": "diffusion.pipeline",
    "optimize": "optimization.loop",
    "profile": "chain.memory.profiling",
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
