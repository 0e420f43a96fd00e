"""The reference's noise schedule and its steps, with the reference's peculiarities or without them.

A step is that of DDIM (arXiv 2010.02502) without added noise: `a sample + b noise`, with the coefficients of
`solvers.edict.ddim_coefficients`.
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
    """Stable Diffusion's noise schedule as in the reference, which `SteppingLayer` uses if it is given none.

    Args:
        quirks: `float64_alphas` and `extra_timesteps` are used.

    Attributes:
        alphas_cumprod: The cumulative alphas, of shape (1000,), float64, on the CPU.
        final_alpha_cumprod: The cumulative alpha that the last step leads to, which is that of timestep 0.
        timesteps: The timesteps in falling order, int64. They are those of a run after `set_timesteps`.
        num_inference_steps: The number that was given to `set_timesteps`, or None.
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
        """Selects every `1000 // num_inference_steps`-th timestep, down to 0.

        Args:
            num_inference_steps: The number of steps. There may be more, see `Quirks.extra_timesteps`.

        Raises:
            ValueError: The number is not between 1 and 1000.
        """
        if not 1 <= num_inference_steps <= 1000:
            raise ValueError(f"num_inference_steps: expected an int from 1 to 1000, got {num_inference_steps!r}")
        self.num_inference_steps = num_inference_steps
        rising = torch.arange(0, 1000, 1000 // num_inference_steps)
        self.timesteps = (rising if self._quirks.extra_timesteps else rising[:num_inference_steps]).flip(0)


def get_alpha_and_beta(t: int | float | Tensor, scheduler: Any, quirks: Quirks = DEFAULT) -> tuple[float, float]:
    """Returns the cumulative alpha of a timestep, and 1 minus it.

    Args:
        t: A number or a tensor of one element. Between two timesteps alpha is interpolated. Below 0 it is
            `final_alpha_cumprod`.
        scheduler: An object with `alphas_cumprod` and `final_alpha_cumprod`.
        quirks: `swapped_interpolation` is used.
    """
    t = float(t)
    if t < 0:
        alpha = float(scheduler.final_alpha_cumprod)
    elif t.is_integer():
        alpha = float(scheduler.alphas_cumprod[int(t)])
    else:
        alphas, low = scheduler.alphas_cumprod, math.floor(t)
        # The weight of the higher timestep is a float32 tensor, as in the reference.
        upper = torch.tensor(t - low, dtype=torch.float32, device=alphas.device)
        if quirks.swapped_interpolation:
            upper = 1 - upper
        alpha = float(alphas[low] * (1 - upper) + alphas[low + 1] * upper)
    return alpha, 1 - alpha


def reference_schedule(
    timesteps: Iterable[int | float | Tensor], scheduler: Any, num_timesteps: int, quirks: Quirks = DEFAULT
) -> Schedule:
    """Returns the noise levels of a loop over timesteps with the reference's steps.

    Args:
        timesteps: Whole numbers in falling order: `scheduler.timesteps`, or a part of them from any point to the end.
        scheduler: The scheduler of the loop.
        num_timesteps: The number of steps that the scheduler was set to. It gives the length of a step if
            `Quirks.fractional_timesteps` is set.
        quirks: Which peculiarities of the reference are reproduced.

    Raises:
        ValueError: The noise levels do not make a `Schedule`.
    """
    if isinstance(timesteps, Tensor):
        timesteps = timesteps.tolist()  # This synchronises once for all of them.
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
    """Returns the cumulative alpha that a step leads to with `Quirks.fractional_timesteps`."""
    stride = scheduler.config.num_train_timesteps / num_timesteps
    # The reference subtracts a number from a tensor, which rounds the difference to float32.
    return get_alpha_and_beta(torch.tensor(t) - stride, scheduler, quirks)[0]


def forward_step(
    self: Any, model_output: Tensor, timestep: int | Tensor, sample: Tensor, quirks: Quirks = DEFAULT
) -> Tensor:
    """Does one DDIM step towards the image (arXiv 2010.02502).

    Args:
        self: The scheduler, after its `set_timesteps`. The reference makes this function a method of it.
        model_output: The predicted noise, of the sample's shape.
        timestep: One of the scheduler's timesteps, a number or a tensor of one element. The step leads to
            `timestep - 1000 / steps`; see `Quirks.fractional_timesteps`.
        sample: The latents, of shape (B, ...).
        quirks: Which peculiarities of the reference are reproduced.

    Returns:
        The latents after the step, in the sample's shape and dtype.

    Raises:
        ValueError: The scheduler has no timesteps yet, or `timestep` is greater than its first.
    """
    alpha, alpha_prev = levels(self, timestep, quirks)
    if quirks.half_updates and sample.dtype in HALF_DTYPES:
        return rounded_step(sample, model_output, alpha, alpha_prev)
    a, _, b = ddim_coefficients(alpha, alpha_prev, "epsilon")
    return ops.coupling(sample, None, model_output, a, 0.0, b)


def reverse_step(
    self: Any, model_output: Tensor, timestep: int | Tensor, sample: Tensor, quirks: Quirks = DEFAULT
) -> Tensor:
    """Undoes `forward_step`, given the `model_output` that it had. Arguments and errors are those of `forward_step`."""
    alpha, alpha_prev = levels(self, timestep, quirks)
    if quirks.half_updates and sample.dtype in HALF_DTYPES:
        return rounded_step(sample, model_output, alpha_prev, alpha)
    a, _, b = ddim_coefficients(alpha, alpha_prev, "epsilon")
    return ops.coupling_inverse(sample, None, model_output, a, 0.0, b)


def rounded_step(sample: Tensor, noise: Tensor, alpha: float, alpha_to: float) -> Tensor:
    """Does a DDIM step in the sample's own dtype, with a rounding after every operation (`Quirks.half_updates`).

    Args:
        sample: The latents.
        noise: The predicted noise, of the same shape.
        alpha: The cumulative alpha of the sample.
        alpha_to: The cumulative alpha that the step leads to.
    """
    ratio = math.sqrt(alpha_to / alpha)
    noise = noise.to(sample.dtype)
    return ratio * sample - (ratio * math.sqrt(1 - alpha)) * noise + math.sqrt(1 - alpha_to) * noise


def levels(scheduler: Any, timestep: int | Tensor, quirks: Quirks) -> tuple[float, float]:
    """Returns the cumulative alphas that the step at a timestep goes from and to. Raises what `forward_step` raises."""
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
    """Returns the cumulative alpha of the scheduler's next timestep below t, or that of the image after the last."""
    lower = [int(other) for other in scheduler.timesteps if other < t]
    return get_alpha_and_beta(max(lower, default=-1), scheduler)[0]
