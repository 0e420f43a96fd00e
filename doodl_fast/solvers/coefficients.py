"""The coefficients of one deterministic step between two noise levels, for every kind of network output."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..diffusion.schedule import FLOW, Schedule


class Level(NamedTuple):
    """A noise level: the latent is `signal * picture + noise * eps`, with standard normal eps.

    A variance-preserving schedule has `signal = sqrt(alphas_cumprod)` and `noise = sqrt(1 - alphas_cumprod)`; a flow
    (rectified flow, flow matching) has `signal = 1 - sigma` and `noise = sigma`.
    """

    signal: float
    noise: float


def levels(schedule: Schedule) -> list[Level]:
    """The noise levels that a sampler passes through, from the start of the first step to the end of the last one."""
    if schedule.is_flow:
        return [Level(1 - sigma, sigma) for sigma in schedule.sigmas]
    alphas = [*schedule.alphas_cumprod, schedule.alphas_cumprod_prev[-1]]
    return [Level(math.sqrt(alpha), math.sqrt(1 - alpha)) for alpha in alphas]


def step_coefficients(start: Level, end: Level, prediction_type: str) -> tuple[float, float]:
    """`(k, b)` of the DDIM step `x' = k x + b network(x)` from one noise level to another, in either direction.

    The network's output and x determine the picture and eps at the start level; the step puts them together again at
    the end level (DDIM, arXiv 2010.02502; for flows this is the Euler step). No formula divides by a level's signal
    unless the network predicts eps, so the other kinds also start from pure noise.

    Args:
        start: The level of x, at which the network is evaluated.
        end: The level of x'.
        prediction_type: What the network returns: "epsilon", "sample", "v_prediction" (arXiv 2202.00512) or "flow"
            (`eps - picture`, whose levels have `signal = 1 - noise`).

    Raises:
        ValueError: The prediction type is unknown.
    """
    if prediction_type == "epsilon":
        return end.signal / start.signal, end.noise - end.signal * start.noise / start.signal
    if prediction_type == "sample":
        return end.noise / start.noise, end.signal - end.noise * start.signal / start.noise
    if prediction_type == FLOW:
        return 1.0, end.noise - start.noise
    cross = end.noise * start.signal - end.signal * start.noise
    if prediction_type == "v_prediction":
        return end.signal * start.signal + end.noise * start.noise, cross
    raise ValueError(f"prediction_type: unknown {prediction_type!r}")
