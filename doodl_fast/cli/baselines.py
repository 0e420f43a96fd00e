"""The baselines of `doodl-fast profile`: ways of taking a gradient through EDICT, ours and those of others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..chain.program import Coupling, Program
from ..chain.walk import walk_plainly
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import Schedule
from ..solvers.edict import EDICT

NAIVE, PER_STEP, REFERENCE = "naive", "checkpoint", "reference"
Pair = tuple[Tensor, Tensor]
OURS: dict[str, dict[str, Any]] = {
    "sources": {"memory": "checkpoint"},
    "exact reversal": {"memory": "reversible", "arithmetic": "exact"},
    "auto": {"memory": "auto"},
    "auto, smallest": {"memory": "auto"},
}


@dataclass(frozen=True)
class Setting:
    """What all baselines share.

    Attributes:
        denoiser: The network with its prompt.
        scheduler: The diffusers scheduler.
        mix_weight: EDICT's p.
        x: The start, (B, C, h, w).
        memory_budget: For memory="auto", see `Chain`.
        timesteps: Gives, for a number of steps, further arguments of `Schedule.from_scheduler` (a flow's mu).
    """

    denoiser: Denoiser
    scheduler: Any
    mix_weight: float
    x: Tensor
    memory_budget: str | None = None
    timesteps: Callable[[int], dict[str, Any]] = lambda steps: {}

    def chain(self, steps: int, **options: Any) -> EDICT:
        """Makes the chain with a number of diffusion steps. `options` are further arguments of EDICT."""
        schedule = Schedule.from_scheduler(self.scheduler, steps, **self.timesteps(steps))
        return EDICT(self.denoiser, schedule, self.mix_weight, **options)


Forward = Callable[[Tensor], Pair]
"""A function from a start x that requires grad to the final latents (x0, y0)."""


def make(name: str, setting: Setting, steps: int) -> Forward:
    """Makes a baseline by its name: one of OURS, "naive", "checkpoint" or "reference=DIR"."""
    if name in OURS:
        options = dict(OURS[name])
        if name == "auto, smallest":
            options["memory_budget"] = setting.chain(steps, **options).smallest_plan(setting.x).peak
        elif name == "auto":
            options["memory_budget"] = setting.memory_budget
        return setting.chain(steps, **options)
    if name == NAIVE:
        return setting.chain(steps, memory="naive")
    if name == PER_STEP:
        return _PerStep(setting.chain(steps))
    return reference(name.removeprefix(REFERENCE + "="), setting, steps)


def label(name: str) -> str:
    """The name that a baseline has in tables and figures."""
    return {NAIVE: "naive backpropagation", PER_STEP: "checkpointed steps"}.get(name, name.partition("=")[0])


class _PerStep:
    """EDICT in plain PyTorch with every step under `torch.utils.checkpoint`.

    The weights are frozen, so this is the code that a careful user would write.
    """

    def __init__(self, chain: EDICT) -> None:
        self.chain = chain

    def __call__(self, x: Tensor) -> Pair:
        dtype = self.chain.state_dtype or torch.float64
        state = (x.to(dtype), x.to(dtype))
        for _, couplings in groupby(self.chain.program, key=lambda coupling: coupling.step):
            state = checkpoint(self._step, tuple(couplings), x.dtype, *state, use_reentrant=False)
        return state[0].to(x.dtype), state[1].to(x.dtype)

    def _step(self, couplings: Program, dtype: torch.dtype, *state: Tensor) -> Pair:
        """Computes the couplings of one step in plain PyTorch."""
        values = list(state)

        def evaluate(coupling: Coupling, source: Tensor) -> Tensor:
            return self.chain.evaluator(source, coupling.tag, None, dtype)

        with self.chain.evaluator.running():
            for _ in walk_plainly(couplings, values, evaluate):
                pass
        return values[0], values[1]


def reference(folder: str, setting: Setting, steps: int) -> Forward:
    """Makes the baseline of the public DOODL code's own layers, by `bench/baselines.py` of this repository.

    That file executes code of the folder, so it is not in the installed package.

    Args:
        folder: A checkout of the public DOODL code.
        setting: What all baselines share.
        steps: The number of diffusion steps.

    Raises:
        ValueError: doodl_fast does not run from a checkout, or the folder is no checkout of DOODL.
    """
    path = Path(__file__).resolve().parents[2] / "bench" / "baselines.py"
    spec = importlib.util.spec_from_file_location("doodl_fast_bench_baselines", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(
            f"--against: {REFERENCE}=DIR executes the code in DIR, so the installed package does not have it; expected "
            "a checkout of doodl_fast with bench/baselines.py, installed with pip install -e ."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        forward: Forward = module.reference(folder, setting, steps)
    except module.ReferenceUnavailable as error:
        raise ValueError(f"--against: {error}") from error
    return forward
