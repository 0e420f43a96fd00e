"""EDICT: exact diffusion inversion via coupled transformations (Wallace, Gokul, Naik, arXiv 2211.12446)."""

from __future__ import annotations

import math
from numbers import Real

import torch

from ..chain.memory.strategies import Memory
from ..chain.program import Coupling, Program, compact
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import Schedule
from .base import DiffusionChain


def edict_program(schedule: Schedule, mix_weight: float = 0.93, first_step: int = 0) -> Program:
    """Builds the couplings of EDICT from noise to image, in the order of the DOODL code (arXiv 2303.13703).

    Let `A = sqrt(abar_prev / abar_t)` and `B = sqrt(1 - abar_prev) - A sqrt(1 - abar_t)` in step i. For even i it is
    `x <- A x + B eps(y)`, then `y <- A y + B eps(x)`; for odd i y comes first. After every step, the last one included,
    comes the mixing `x <- p x + (1 - p) y`, `y <- p y + (1 - p) x` with p = mix_weight. Networks that predict v or the
    sample need no other program: eps is linear in their output and in the point of evaluation, so the difference goes
    into the coefficients. See `ddim_coefficients`, also for zero terminal signal-to-noise, and `flow_coefficients` for
    the updates of a flow.

    Args:
        schedule: The noise levels and timesteps.
        mix_weight: p in (0, 1].
        first_step: The number i of the schedule's first step, for a schedule that is the end of a longer one.

    Returns:
        The couplings. Their tags are timesteps, their targets 0 for x and 1 for y.

    Raises:
        ValueError: `mix_weight` is not in (0, 1]; undoing the mixing divides by it.
    """
    if isinstance(mix_weight, bool) or not isinstance(mix_weight, Real) or not 0 < mix_weight <= 1:
        raise ValueError(f"mix_weight: expected a number in (0, 1], got {mix_weight!r}; EDICT and DOODL use 0.93")
    p = float(mix_weight)
    couplings: list[Coupling] = []
    for step, (t, (a, c, b)) in enumerate(zip(schedule.timesteps, _updates(schedule), strict=True)):
        first = (first_step + step) % 2
        couplings += [Coupling(target, a, c, b, step, t) for target in (first, 1 - first)]
        couplings += [Coupling(target, p, 1 - p, 0.0, step, None) for target in (0, 1)]
    return compact(couplings)


def _updates(schedule: Schedule) -> list[tuple[float, float, float]]:
    """The coefficients (a, c, b) of every step of the schedule."""
    if schedule.is_flow:
        return [flow_coefficients(*ends) for ends in zip(schedule.sigmas, schedule.sigmas[1:], strict=False)]
    alphas = zip(schedule.alphas_cumprod, schedule.alphas_cumprod_prev, strict=True)
    return [ddim_coefficients(*ends, schedule.prediction_type) for ends in alphas]


def flow_coefficients(sigma: float, sigma_next: float) -> tuple[float, float, float]:
    """Returns the coefficients of one Euler step of a flow, `target <- a target + c source + b network(source)`.

    The network predicts `v = noise - picture`, and a step is `target + (sigma_next - sigma) v(source)`.

    At sigma = 1 the target is nothing but noise. As in `ddim_coefficients` it keeps its own noise, and the network
    gives the picture alone, `source - v(source)`: the update is `sigma_next target + (1 - sigma_next) picture`, which
    is Euler's step where target and source are equal. So the second latent of a pair, whose source has made the step
    already, is not moved twice.

    Args:
        sigma: The noise level before the step, in (0, 1].
        sigma_next: The noise level after the step, in [0, 1).

    Returns:
        The coefficients (a, c, b).
    """
    if sigma == 1:
        return sigma_next, 1 - sigma_next, sigma_next - 1
    return 1.0, 0.0, sigma_next - sigma


def ddim_coefficients(alpha: float, alpha_prev: float, prediction_type: str) -> tuple[float, float, float]:
    """Returns the coefficients of one DDIM update, `target <- a target + c source + b network(source)`.

    DDIM: arXiv 2010.02502. With v-prediction (arXiv 2202.00512) `eps = sqrt(alpha) v + sqrt(1 - alpha) source`; with
    sample prediction `eps = (source - sqrt(alpha) x0) / sqrt(1 - alpha)`.

    At alpha = 0 (zero terminal signal-to-noise, arXiv 2305.08891) the target is nothing but noise. It is its own eps,
    the network gives x0 alone (`-v`, or the sample), and the update is `sqrt(1 - alpha_prev) target + sqrt(alpha_prev)
    x0(source)`: DDIM's where target and source are equal, and invertible.

    Args:
        alpha: The cumulative alpha before the step.
        alpha_prev: The cumulative alpha after the step.
        prediction_type: What the network returns: "epsilon", "v_prediction" or "sample".

    Returns:
        The coefficients (a, c, b).

    Raises:
        ValueError: The prediction type is unknown, or "epsilon" with alpha = 0, where eps does not give x0.
    """
    if alpha == 0 and prediction_type in ("v_prediction", "sample"):
        return math.sqrt(1 - alpha_prev), 0.0, math.sqrt(alpha_prev) * (-1 if prediction_type == "v_prediction" else 1)
    if alpha == 0:
        raise ValueError(f"alpha: expected more than 0 with prediction_type={prediction_type!r}, got 0")
    a = math.sqrt(alpha_prev / alpha)
    per_eps = math.sqrt(1 - alpha_prev) - a * math.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        return a, 0.0, per_eps
    if prediction_type == "v_prediction":
        return a, per_eps * math.sqrt(1 - alpha), per_eps * math.sqrt(alpha)
    if prediction_type == "sample":
        return a, per_eps / math.sqrt(1 - alpha), -per_eps * math.sqrt(alpha) / math.sqrt(1 - alpha)
    raise ValueError(f"prediction_type: unknown {prediction_type!r}")


class EDICT(DiffusionChain):
    """EDICT's exactly invertible sampler (arXiv 2211.12446), differentiable end to end as DOODL needs it.

    DOODL: Wallace et al., ICCV 2023, arXiv 2303.13703. Latents are (B, C, ...) of fp16, bf16, fp32 or fp64, x and y
    alike; results and gradients have their dtype. Gradients are also given to the denoiser's conditions that require
    grad, never to weights.

    Args:
        denoiser: eps(x, t) with its conditions.
        schedule: The noise levels. Its prediction type tells what the network returns.
        mix_weight: p in (0, 1], how much of itself each latent keeps in the mixing after every step. With
            arithmetic="exact" or "exact64" the nearest decimal of 4 digits is used (0.93 is 93/100, exactly).
        memory: What is kept for the gradient, see `Chain`.
        state_dtype: In which x, y and their cotangents are carried, see `Chain`.
        arithmetic: "float", "exact" or "exact64", see `Chain`. With the exact ones `state`, `forward_state` and
            `inverse_state` lose no bit.
        drift_tolerance: How far undone couplings may miss the start, see `Chain`.
        memory_budget: For memory="auto", see `Chain`.

    Raises:
        TypeError: `denoiser` is no `Denoiser`, or `schedule` no `Schedule`.
        ValueError: An option is out of range; the error names it.

    Example:
        >>> chain = EDICT.from_pipeline(pipe, "a dog")
        >>> xT = chain.noise(seed=0)
        >>> x0, y0 = chain(xT)  # from noise to image latents; y starts equal to x
        >>> xT, yT = chain.inverse(x0, y0)  # and back, exact up to rounding
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
        super().__init__(
            denoiser,
            schedule,
            lambda noise_levels: edict_program(noise_levels, mix_weight),
            memory=memory,
            state_dtype=state_dtype,
            arithmetic=arithmetic,
            drift_tolerance=drift_tolerance,
            memory_budget=memory_budget,
        )
        self._mix_weight = float(mix_weight)

    @property
    def mix_weight(self) -> float:
        """The weight p of the mixing, as it was given."""
        return self._mix_weight

    def __repr__(self) -> str:
        return (
            f"EDICT({self.denoiser!r}, {self.schedule!r}, mix_weight={self.mix_weight:g}, memory={self.memory!r}, "
            f"arithmetic={self.arithmetic!r}: {self.num_network_calls} network calls)"
        )
