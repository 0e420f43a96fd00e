"""Reads the noise levels of diffusers' flow-matching schedulers (Stable Diffusion 3, FLUX, Wan, ...)."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .scheduler_check import is_kind, setting

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
ROUNDING = 1e-6
"""How far diffusers' float32 arithmetic may take a sigma above 1."""


class FlowSteps(NamedTuple):
    """The noise levels of a flow.

    Attributes:
        timesteps: What the network is given in each of the n steps.
        sigmas: The n + 1 noise levels, from the start of the first step to the end of the last one.
        missing: What the scheduler does besides Euler's method, in words.
    """

    timesteps: tuple[int | float, ...]
    sigmas: tuple[float, ...]
    missing: tuple[str, ...]


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler is one of diffusers' flow-matching schedulers, or derives from one."""
    return is_kind(scheduler, FLOW_SCHEDULERS)


def flow_steps(scheduler: Any, steps: int, mu: float | None = None, sigmas: Sequence[float] | None = None) -> FlowSteps:
    """Reads the timesteps and sigmas that a flow-matching scheduler gives to a number of steps.

    The scheduler computes them itself, on a copy, so its shift, dynamic shifting, terminal shift and its Karras,
    exponential or beta spacing are all in them.

    Args:
        scheduler: One of `FLOW_SCHEDULERS`. It is never changed.
        steps: The number of inference steps.
        mu: The amount of dynamic shifting, for schedulers that are set to it.
        sigmas: The sigmas before shifting, as the pipelines of FLUX give them to their scheduler. None lets the
            scheduler choose.

    Raises:
        ValueError: `mu` or `sigmas` is missing or has no use, or the scheduler runs from sigma 0 to 1.
    """
    name = type(scheduler).__name__
    if setting(scheduler, "invert_sigmas", False):
        raise ValueError(
            f"scheduler: {name} has invert_sigmas=True (as Mochi has), so its sigmas rise and its network predicts the "
            "velocity towards the picture; expected invert_sigmas=False, with the sign of the network's output changed"
        )
    known = inspect.signature(scheduler.set_timesteps).parameters
    dynamic = bool(setting(scheduler, "use_dynamic_shifting", False))
    if dynamic and mu is None:
        raise ValueError(
            f"mu: expected a number because {name} has use_dynamic_shifting=True, got None; the pipelines of diffusers "
            "compute it from the picture's size (calculate_shift)"
        )
    if mu is not None and not dynamic:
        raise ValueError(f"mu: expected None because {name} has use_dynamic_shifting=False, got {mu!r}")
    if sigmas is not None and "sigmas" not in known:
        raise ValueError(f"sigmas: expected None because {name} chooses them itself, got {len(sigmas)} of them")
    if sigmas is not None and len(sigmas) != steps:
        raise ValueError(f"sigmas: expected {steps} numbers, one for each inference step, got {len(sigmas)}")
    given = {"mu": mu, "sigmas": None if sigmas is None else [float(sigma) for sigma in sigmas]}
    stepper = copy.deepcopy(scheduler)
    stepper.set_timesteps(steps, **{key: value for key, value in given.items() if value is not None})
    # A scheduler of second order has most of its levels twice.
    levels = list(dict.fromkeys(torch.as_tensor(stepper.sigmas).double().tolist()))
    timesteps = list(dict.fromkeys(torch.as_tensor(stepper.timesteps).double().tolist()))
    if not all(map(math.isfinite, levels)):
        raise ValueError(
            f"scheduler: {name} gives noise levels that are no numbers for mu={mu!r}: {levels}; its dynamic shift is "
            "too large for float32, so use a smaller picture or video, or other settings of base_shift and max_shift"
        )
    if 1 < levels[0] < 1 + ROUNDING:
        levels[0] = 1.0
    missing = []
    if is_kind(scheduler, ["FlowMatchHeunDiscreteScheduler"]):
        missing.append("its second-order steps")
    if is_kind(scheduler, ["FlowMatchLCMScheduler"]) or setting(scheduler, "stochastic_sampling", False):
        missing.append("the noise that it adds in every step")
    return FlowSteps(tuple(int(t) if t == int(t) else t for t in timesteps), tuple(levels), tuple(missing))
