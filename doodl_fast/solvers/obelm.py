"""O-BELM: the bidirectional explicit linear multi-step sampler of least local error (Wang et al., arXiv 2410.07273)."""

from __future__ import annotations

import torch

from ..chain.memory.strategies import Memory
from ..chain.program import Coupling, Program
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import Schedule
from .coefficients import Level, levels, step_coefficients
from .single import SingleLatentChain


def obelm_program(schedule: Schedule) -> Program:
    """The couplings of O-BELM from noise to picture, one network call for each step, of second order.

    In the variables `z = x / signal` and `s = noise / signal` a sampler solves `dz/ds = eps`. (For a flow it solves
    `dx/dsigma = v` as it stands.) O-BELM is the two-step method that is exact for every solution of second degree. With
    `h = s_i - s_{i+1}` and `H = s_{i-1} - s_i`, levels counted from the noise, it is

        z_{i+1} = (h/H)^2 z_{i-1} + (1 - (h/H)^2) z_i - h (h + H) / H * eps_i

    It replaces `x_{i-1}` by a coupling. The first step is DDIM's: it is added to a second latent that is zero at the
    start of the chain.

    Args:
        schedule: The noise levels, of any prediction type.

    Returns:
        The program. It starts from latent 0, with latent 1 equal to zero, and the latent that its last coupling
        changes is the picture. A step between equal noise levels changes nothing (its `a` would be 0) and is left out.
    """
    kind, passed = schedule.prediction_type, levels(schedule)
    program: list[Coupling] = []
    for step, t in enumerate(schedule.timesteps):
        if passed[step] == passed[step + 1]:
            continue
        if not program:
            k, b = step_coefficients(passed[step], passed[step + 1], kind)
            program.append(Coupling(1, 1.0, k, b, step, t))
            continue
        before, now, after = passed[step - 1 : step + 2]
        a, share, length = _weights(before, now, after, kind)
        per_x, per_output = _eps(now, kind)
        target = 1 - program[-1].target
        program.append(Coupling(target, a, share + length * per_x, length * per_output, step, t))
    return tuple(program)


def _weights(before: Level, now: Level, after: Level, kind: str) -> tuple[float, float, float]:
    """What `x_{i-1}`, `x_i` and the slope (eps, or v of a flow) are multiplied by."""
    if kind == "flow":
        h, wide = now.noise - after.noise, before.noise - now.noise
        scale_before = scale_now = scale = 1.0
    elif before.signal == 0:
        # From zero terminal signal-to-noise H is infinite, and the step does not read what came before.
        h = now.noise / now.signal - after.noise / after.signal
        return 0.0, after.signal / now.signal, -h * after.signal
    else:
        position = [level.noise / level.signal for level in (before, now, after)]
        h, wide = position[1] - position[2], position[0] - position[1]
        scale, scale_before, scale_now = after.signal, after.signal / before.signal, after.signal / now.signal
    ratio = (h / wide) ** 2
    return ratio * scale_before, (1 - ratio) * scale_now, -h * (h + wide) / wide * scale


def _eps(level: Level, kind: str) -> tuple[float, float]:
    """`(p, q)` with `slope = p x + q network(x)` at a level."""
    if kind in ("epsilon", "flow"):
        return 0.0, 1.0
    if kind == "v_prediction":
        return level.noise, level.signal
    return 1 / level.noise, -level.signal / level.noise


class OBELM(SingleLatentChain):
    """O-BELM's exactly invertible sampler (arXiv 2410.07273), of second order, with one network call for each step.

    It costs half of EDICT's calls. Latents are (B, C, ...) of fp16, bf16, fp32 or fp64; results and gradients have
    their dtype. Gradients are also given to the denoiser's conditions that require grad, never to weights.

    Args:
        denoiser: The network with its conditions.
        schedule: The noise levels. Its prediction type tells what the network returns.
        memory: What is kept for the gradient, see `Chain`.
        state_dtype: In which the latents and their cotangents are carried, see `Chain`.
        arithmetic: "float", "exact" or "exact64", see `Chain`.
        drift_tolerance: How far undone couplings may miss the start, see `Chain`.
        memory_budget: For memory="auto", see `Chain`.

    Raises:
        TypeError: `denoiser` is no `Denoiser`, or `schedule` no `Schedule`.
        ValueError: An option is out of range; the error names it.

    Example:
        >>> chain = OBELM.from_pipeline(pipe, "a dog")
        >>> x0, x1 = chain(chain.noise(seed=0))  # the picture's latents, and those of the step before
        >>> xT, rest = chain.inverse(x0, x1)  # rest is zero up to rounding
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        memory: Memory = "checkpoint",
        state_dtype: torch.dtype | None = None,
        arithmetic: str = "float",
        drift_tolerance: float | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(
            denoiser,
            schedule,
            obelm_program,
            memory=memory,
            state_dtype=state_dtype,
            arithmetic=arithmetic,
            drift_tolerance=drift_tolerance,
            memory_budget=memory_budget,
        )
