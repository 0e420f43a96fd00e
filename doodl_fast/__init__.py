"""doodl_fast: exact, memory-lean gradients through whole diffusion chains, for DOODL (arXiv 2303.13703).

Most programs need few of these names:

- `EDICT`, `DDIM`, `BDIA`, `OBELM`, `Rex` and `Sampler` (the pipeline's own scheduler) are the solvers.
  `EDICT.from_pipeline(pipe, prompt)` makes a chain of a diffusers pipeline, with `chain.noise(seed=0)` and
  `chain.decode(latents)`.
- `optimize(chain, latents, decode, loss)` optimises the starting noise. `guidance` has losses, and any function of
  images is one.
- `Checkpoint`, `Reversible`, `Naive` and `Auto` say what a chain keeps for its gradient.
- `DoodlPipeline.from_pipe(pipe)(prompt, loss=loss)` does all of this with the arguments of a diffusers pipeline.
- `Denoiser`, `Schedule`, `Decoder` and `encode_prompt` are the parts of a chain that is made by hand.
- `profile` and `check_reversibility` look into a chain. `shapes` is a small pipeline that comes with the package.

Submodules and names are loaded when they are first used, so `import doodl_fast` needs nothing beyond torch.
"""

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
    from .chain.program import Coupling, Program
    from .chain.reversibility import Reversibility, check_reversibility
    from .diffusion.decoder import Decoder
    from .diffusion.denoiser import Denoiser
    from .diffusion.guided import Guided
    from .diffusion.images import ImageTensor
    from .diffusion.pipeline import encode_prompt
    from .diffusion.schedule import Schedule
    from .diffusion.tracing import SamplerSteps
    from .diffusion.videos import VideoTensor
    from .integrations.pipeline import DoodlPipeline
    from .ops import backend
    from .optimization.loop import Result, StepInfo, optimize
    from .optimization.update import UpdateSettings
    from .solvers.base import DiffusionChain
    from .solvers.bdia import BDIA
    from .solvers.ddim import DDIM
    from .solvers.edict import EDICT
    from .solvers.obelm import OBELM
    from .solvers.one_call import LowVariance, StraightThrough
    from .solvers.own import solver
    from .solvers.rex import Rex
    from .solvers.rex_sde import RexSDE
    from .solvers.sampler import LCM, DPMSolver, Sampler, UniPC
    from .solvers.truncated import LastSteps

__all__ = [
    "BDIA",
    "DDIM",
    "EDICT",
    "LCM",
    "OBELM",
    "Auto",
    "Chain",
    "Checkpoint",
    "Coupling",
    "DPMSolver",
    "Decoder",
    "Denoiser",
    "DiffusionChain",
    "DoodlPipeline",
    "Guided",
    "ImageTensor",
    "LastSteps",
    "LatticeState",
    "LowVariance",
    "Naive",
    "Program",
    "Result",
    "Reversibility",
    "Reversible",
    "Rex",
    "RexSDE",
    "Sampler",
    "SamplerSteps",
    "Schedule",
    "StepInfo",
    "StraightThrough",
    "UniPC",
    "UpdateSettings",
    "VideoTensor",
    "backend",
    "check_reversibility",
    "encode_prompt",
    "guidance",
    "ops",
    "optimize",
    "profile",
    "shapes",
    "solver",
]

_HOMES = {
    "Auto": "chain.memory.strategies",
    "Chain": "chain.chain",
    "Checkpoint": "chain.memory.strategies",
    "Coupling": "chain.program",
    "Decoder": "diffusion.decoder",
    "Denoiser": "diffusion.denoiser",
    "DiffusionChain": "solvers.base",
    "BDIA": "solvers.bdia",
    "DDIM": "solvers.ddim",
    "EDICT": "solvers.edict",
    "Guided": "diffusion.guided",
    "ImageTensor": "diffusion.images",
    "OBELM": "solvers.obelm",
    "Rex": "solvers.rex",
    "RexSDE": "solvers.rex_sde",
    "DPMSolver": "solvers.sampler",
    "DoodlPipeline": "integrations.pipeline",
    "LCM": "solvers.sampler",
    "Sampler": "solvers.sampler",
    "solver": "solvers.own",
    "SamplerSteps": "diffusion.tracing",
    "UniPC": "solvers.sampler",
    "LastSteps": "solvers.truncated",
    "LowVariance": "solvers.one_call",
    "StraightThrough": "solvers.one_call",
    "LatticeState": "chain.exact.state",
    "Naive": "chain.memory.strategies",
    "Program": "chain.program",
    "Result": "optimization.loop",
    "Reversibility": "chain.reversibility",
    "Reversible": "chain.memory.strategies",
    "Schedule": "diffusion.schedule",
    "StepInfo": "optimization.loop",
    "UpdateSettings": "optimization.update",
    "VideoTensor": "diffusion.videos",
    "backend": "ops",
    "check_reversibility": "chain.reversibility",
    "encode_prompt": "diffusion.pipeline",
    "optimize": "optimization.loop",
    "profile": "chain.memory.profiling",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES.get(name, name)}", __name__)
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names, also those that are not loaded yet."""
    return sorted(__all__)
