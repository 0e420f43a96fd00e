"""Chains for diffusion models: a solver's program, run by the engine with a denoiser."""

from __future__ import annotations

import torch

from .chain import Chain, Memory
from .denoiser import Denoiser
from .schedule import Schedule
from .solvers import edict_program


class EDICT(Chain):
    """EDICT's exactly invertible sampler (arXiv 2211.12446), differentiable end to end as DOODL needs it (arXiv
    2303.13703).

        x0, y0 = chain(xT)             # noise -> image latents; y starts equal to x
        xT, yT = chain.inverse(x0, y0)  # and back, exact up to rounding

    denoiser: eps(x, t) with its conditions.
    schedule: the noise levels; its prediction type tells what the network returns.
    mix_weight: p in (0, 1], how much of itself each latent keeps in the mixing after every step.
    memory, state_dtype, arithmetic, drift_tolerance, memory_budget: see `Chain`. With arithmetic="exact" or "exact64"
        the p that is used is the nearest decimal of 4 digits (0.93 is 93/100, exactly), and `state`, `forward_state`
        and `inverse_state` lose no bit.

    Latents are (B, C, ...) of fp16, bf16, fp32 or fp64, x and y alike; results and gradients have their dtype.
    Gradients are also given to the denoiser's conditions that require grad, never to weights.
    Raises TypeError or ValueError, naming the argument.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        mix_weight: float = 0.93,
        memory: Memory = "checkpoint",
        state_dtype: torch.dtype | None = None,
        arithmetic: str = "float",
        drift_tolerance: float | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        if not isinstance(denoiser, Denoiser):
            raise TypeError(
                f"denoiser: expected a Denoiser, got {type(denoiser).__name__}; use Denoiser(unet, cond, uncond)"
            )
        if not isinstance(schedule, Schedule):
            got = type(schedule).__name__
            raise TypeError(f"schedule: expected a Schedule, got {got}; use Schedule.from_scheduler(scheduler, steps)")
        super().__init__(
            denoiser,
            edict_program(schedule, mix_weight),
            memory,
            state_dtype=state_dtype,
            arithmetic=arithmetic,
            drift_tolerance=drift_tolerance,
            memory_budget=memory_budget,
        )
        self._schedule, self._mix_weight = schedule, float(mix_weight)
        self._denoiser = denoiser

    @property
    def denoiser(self) -> Denoiser:
        return self._denoiser

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @property
    def mix_weight(self) -> float:
        return self._mix_weight

    def __repr__(self) -> str:
        return (
            f"EDICT({self.denoiser!r}, {self.schedule!r}, mix_weight={self.mix_weight:g}, memory={self.memory!r}, "
            f"arithmetic={self.arithmetic!r}: {self.num_network_calls} network calls)"
        )
