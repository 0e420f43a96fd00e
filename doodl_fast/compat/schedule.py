"""The reference's noise schedule, with its peculiarities or without: from timesteps to the coefficients of a step.

A step is DDIM's (arXiv 2010.02502) without noise: `A sample + B noise`, see `solvers.edict.ddim_coefficients`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..diffusion.networks import HALF_DTYPES
from ..diffusion.schedule import Schedule
from ..solvers.edict import ddim_coefficients
from .quirks import Quirks

DEFAULT = Quirks()


class ReferenceScheduler:
    """What `SteppingLayer` makes for itself: Stable Diffusion's noise schedule, as the reference's own copy has it.

    alphas_cumprod: (1000,) float64 on the CPU (`Quirks.float64_alphas`). final_alpha_cumprod: where the last step
    leads, the alpha of timestep 0. timesteps: int64, falling, after `set_timesteps`.
    """

    def __init__(self, quirks: Quirks = DEFAULT) -> None:
        self.config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon", set_alpha_to_one=False)
        roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
        alphas = torch.cumprod(1 - roots.square(), 0)
        self.alphas_cumprod = alphas if quirks.float64_alphas else alphas.float()
        self.final_alpha_cumprod = self.alphas_cumprod[0]
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(999, -1, -1)
        self._quirks = quirks

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Every `1000 // num_inference_steps`-th timestep down to 0. Raises ValueError for a count out of 1 to 1000."""
        if not 1 <= num_inference_steps <= 1000:
            raise ValueError(f"num_inference_steps: expected an int from 1 to 1000, got {num_inference_steps!r}")
        self.num_inference_steps = num_inference_steps
        rising = torch.arange(0, 1000, 1000 // num_inference_steps)
        self.timesteps = (rising if self._quirks.extra_timesteps else rising[:num_inference_steps]).flip(0)


def get_alpha_and_beta(t: int | float | Tensor, scheduler: Any, quirks: Quirks = DEFAULT) -> tuple[float, float]:
    """The cumulative alpha at a timestep and 1 minus it; between two timesteps they are interpolated.

    t: a number or a tensor of one element; below 0 it is the noise level of the image, `final_alpha_cumprod`.
    scheduler: anything with `alphas_cumprod` and `final_alpha_cumprod`.
    """
    t = float(t)
    if t < 0:
        alpha = float(scheduler.final_alpha_cumprod)
    elif t.is_integer():
        alpha = float(scheduler.alphas_cumprod[int(t)])
    else:
        alphas, low = scheduler.alphas_cumprod, math.floor(t)
        # in float32 where the alphas are
        upper = torch.tensor(t - low, dtype=torch.float32, device=alphas.device)  # the weight of the higher timestep
        if quirks.swapped_interpolation:
            upper = 1 - upper
        alpha = float(alphas[low] * (1 - upper) + alphas[low + 1] * upper)
    return alpha, 1 - alpha


def reference_schedule(
    timesteps: Iterable[int | float | Tensor], scheduler: Any, num_timesteps: int, quirks: Quirks = DEFAULT
) -> Schedule:
    """The noise levels that a loop over `timesteps` goes through with the reference's steps, as a `Schedule`.

    timesteps: falling whole numbers, `scheduler.timesteps` or a part of them from any point to the end.
    num_timesteps: what the scheduler was set to, which fixes a fractional step's length (`fractional_timesteps`).
    Raises ValueError, as `Schedule`, for noise levels that cannot be stepped between.
    """
    if isinstance(timesteps, Tensor):
        timesteps = timesteps.tolist()  # one synchronisation for all
    whole = tuple(int(t) for t in timesteps)
    alphas = [get_alpha_and_beta(t, scheduler)[0] for t in whole]
    if quirks.fractional_timesteps:
        previous = [_previous_alpha(t, scheduler, num_timesteps, quirks) for t in whole]
    else:
        previous = [*alphas[1:], get_alpha_and_beta(-1, scheduler)[0]]
    kind = "epsilon"
    if not quirks.ignored_prediction_type:
        kind = str(getattr(scheduler.config, "prediction_type", kind))
    return Schedule(whole, tuple(alphas), tuple(previous), kind)


def _previous_alpha(t: int, scheduler: Any, num_timesteps: int, quirks: Quirks) -> float:
    stride = scheduler.config.num_train_timesteps / num_timesteps
    # the difference of a tensor and a number, as the reference forms it: in float32
    return get_alpha_and_beta(torch.tensor(t) - stride, scheduler, quirks)[0]


def forward_step(
    self: Any, model_output: Tensor, timestep: int | Tensor, sample: Tensor, quirks: Quirks = DEFAULT
) -> Tensor:
    """One DDIM step towards the image: `A sample + B model_output` in the sample's dtype.

    self: the scheduler, after its `set_timesteps`. model_output: the noise, of sample's shape (B, ...). timestep: a
    number or a tensor of one element, one of the scheduler's; the step leads to `timestep - 1000 / steps`.
    Raises ValueError for a scheduler without timesteps and for a timestep beyond its first.
    """
    alpha, alpha_prev = levels(self, timestep, quirks)
    if quirks.half_updates and sample.dtype in HALF_DTYPES:
        return rounded_step(sample, model_output, alpha, alpha_prev)
    a, _, b = ddim_coefficients(alpha, alpha_prev, "epsilon")
    return ops.coupling(sample, None, model_output, a, 0.0, b)


def reverse_step(
    self: Any, model_output: Tensor, timestep: int | Tensor, sample: Tensor, quirks: Quirks = DEFAULT
) -> Tensor:
    """Undoes `forward_step` where model_output is the one that it had; arguments and errors as there."""
    alpha, alpha_prev = levels(self, timestep, quirks)
    if quirks.half_updates and sample.dtype in HALF_DTYPES:
        return rounded_step(sample, model_output, alpha_prev, alpha)
    a, _, b = ddim_coefficients(alpha, alpha_prev, "epsilon")
    return ops.coupling_inverse(sample, None, model_output, a, 0.0, b)


def rounded_step(sample: Tensor, noise: Tensor, alpha: float, alpha_to: float) -> Tensor:
    """A DDIM step from one cumulative alpha to another in the sample's own dtype, every term of it rounded
    (`Quirks.half_updates`)."""
    ratio = math.sqrt(alpha_to / alpha)
    noise = noise.to(sample.dtype)
    return ratio * sample - (ratio * math.sqrt(1 - alpha)) * noise + math.sqrt(1 - alpha_to) * noise


def levels(scheduler: Any, timestep: int | Tensor, quirks: Quirks) -> tuple[float, float]:
    """The cumulative alphas that the step at a timestep goes from and to. Raises ValueError as `forward_step`."""
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError("scheduler: expected one that knows its timesteps; call its set_timesteps first")
    t, first = int(timestep), int(scheduler.timesteps.max())
    if t > first:
        raise ValueError(f"timestep: expected at most {first}, the scheduler's first, got {t}")
    return (
        get_alpha_and_beta(t, scheduler)[0],
        _previous_alpha(t, scheduler, scheduler.num_inference_steps, quirks)
        if quirks.fractional_timesteps
        else _next_alpha(t, scheduler),
    )


def _next_alpha(t: int, scheduler: Any) -> float:
    lower = [int(other) for other in scheduler.timesteps if other < t]
    return get_alpha_and_beta(max(lower, default=-1), scheduler)[0]
