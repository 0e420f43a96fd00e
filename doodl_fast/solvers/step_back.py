"""A guess of the latents before the last step, for a picture that no chain has made."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..chain.chain import Chain
from ..chain.evaluator import Evaluator
from ..chain.program import Coupling
from ..diffusion.schedule import Schedule
from .coefficients import levels, step_coefficients


def step_back(network: Evaluator, schedule: Schedule, x: Tensor, state_dtype: torch.dtype | None = None) -> Tensor:
    """Undoes the last DDIM step of a schedule approximately, with one network call, which has a gradient.

    The step is `x = k y + b network(y)`, and the network is evaluated at x in place of y.

    Args:
        network: The network with its conditions.
        schedule: The noise levels. Steps that change nothing do not count.
        x: The picture's latents, (B, C, ...).
        state_dtype: In which it is computed, see `Chain`.

    Returns:
        The latents y, like x. They are x itself if the step does not tell them (it has k = 0 for a network that
        predicts the picture, where no noise is left), or if there is no step.
    """
    steps = list(zip(schedule.timesteps, itertools.pairwise(levels(schedule)), strict=True))
    t, (start, end) = next((step for step in reversed(steps) if step[1][0] != step[1][1]), (None, (None, None)))
    if start is None or end is None:
        return x
    k, b = step_coefficients(start, end, schedule.prediction_type)
    if k == 0:
        return x
    back = Chain(network, (Coupling(1, 0.0, 1 / k, -b / k, 0, t),), state_dtype=state_dtype)
    return back(x, torch.zeros_like(x))[1]
