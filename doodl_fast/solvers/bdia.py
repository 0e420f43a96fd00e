"""BDIA: exact diffusion inversion by bi-directional integration (Zhang, Lewis, Kleijn, arXiv 2307.10829)."""

from __future__ import annotations

import torch

from ..chain.memory.strategies import Memory
from ..chain.program import Coupling, Program
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import Schedule
from .coefficients import levels, step_coefficients
from .single import SingleLatentChain, check_real


def bdia_program(schedule: Schedule, gamma: float = 1.0) -> Program:
    """The couplings of BDIA-DDIM from noise to picture, one network call for each step.

    Let `x_i` be the latent at the i-th noise level, counted from the noise. A step takes two latents to the next one:

        x_{i+1} = gamma * (x_{i-1} - D(x_i; i -> i-1)) + D(x_i; i -> i+1)

    where `D(x_i; i -> j)` is the DDIM step from level i to level j, in either direction, with the network evaluated at
    `x_i`. So the new latent replaces `x_{i-1}` by a coupling with `a = gamma`. The first step is DDIM's: it is added to
    a second latent that is zero at the start of the chain.

    Args:
        schedule: The noise levels, of any prediction type.
        gamma: How far the step relies on the latent two levels back, in (0, 1]. 1 is the most accurate (second order)
            and the least stable with few steps; towards 0 the picture tends to DDIM's.

    Returns:
        The program. It starts from latent 0, with latent 1 equal to zero, and the latent that its last coupling
        changes is the picture. A last step between equal noise levels changes nothing and is left out.

    Raises:
        ValueError: gamma is not in (0, 1]: with 0 the step could not be undone.
    """
    gamma = check_real("gamma", gamma, 0, 1, "1.0 is the paper's choice, and DDIM is what 0 would be")
    kind, passed = schedule.prediction_type, levels(schedule)
    program: list[Coupling] = []
    for step, t in enumerate(schedule.timesteps):
        if passed[step] == passed[step + 1]:
            continue
        k, b = step_coefficients(passed[step], passed[step + 1], kind)
        if not program:
            program.append(Coupling(1, 1.0, k, b, step, t))
            continue
        k_back, b_back = step_coefficients(passed[step], passed[step - 1], kind)
        target = 1 - program[-1].target
        program.append(Coupling(target, gamma, k - gamma * k_back, b - gamma * b_back, step, t))
    return tuple(program)


class BDIA(SingleLatentChain):
    """BDIA's exactly invertible sampler (arXiv 2307.10829), with one network call for each step.

    It costs half of EDICT's calls. Latents are (B, C, ...) of fp16, bf16, fp32 or fp64; results and gradients have
    their dtype. Gradients are also given to the denoiser's conditions that require grad, never to weights.

    Args:
        denoiser: The network with its conditions.
        schedule: The noise levels. Its prediction type tells what the network returns.
        gamma: How far a step relies on the latents two levels back, in (0, 1]. 1 is the most accurate and the least
            stable; towards 0 the pictures tend to DDIM's, and inverting divides by gamma in every step.
        memory: What is kept for the gradient, see `Chain`.
        state_dtype: In which the latents and their cotangents are carried, see `Chain`.
        arithmetic: "float", "exact" or "exact64", see `Chain`.
        drift_tolerance: How far undone couplings may miss the start, see `Chain`.
        memory_budget: For memory="auto", see `Chain`.

    Raises:
        TypeError: `denoiser` is no `Denoiser`, or `schedule` no `Schedule`.
        ValueError: An option is out of range; the error names it.

    Example:
        >>> chain = BDIA.from_pipeline(pipe, "a dog", gamma=0.5)
        >>> x0, x1 = chain(chain.noise(seed=0))  # the picture's latents, and those of the step before
        >>> xT, rest = chain.inverse(x0, x1)  # rest is zero up to rounding
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        gamma: float = 1.0,
        memory: Memory = "checkpoint",
        state_dtype: torch.dtype | None = None,
        arithmetic: str = "float",
        drift_tolerance: float | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(
            denoiser,
            schedule,
            lambda noise_levels: bdia_program(noise_levels, gamma),
            memory=memory,
            state_dtype=state_dtype,
            arithmetic=arithmetic,
            drift_tolerance=drift_tolerance,
            memory_budget=memory_budget,
        )
