"""Reads the noise levels of Stable Audio's scheduler, whose latents are scaled as in EDM (arXiv 2206.00364).

Such a latent is picture plus sigma times noise, and the network gets it divided by sqrt(1 + sigma^2). What the network
gets is thus a latent of a diffusion with the cumulative alpha 1 / (1 + sigma^2), and where the scheduler takes the
output for a v-prediction, it is one in the usual sense.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from .scheduler_check import is_kind, setting

EDM_SCHEDULERS = ("CosineDPMSolverMultistepScheduler",)


class EDMSteps(NamedTuple):
    """The noise levels of a scheduler in terms of a diffusion.

    Attributes:
        timesteps: What the network is given in each of the n steps, from 0 to 1.
        alphas: The n + 1 cumulative alphas, from the start of the first step to the end of the last one.
        missing: What the scheduler does besides DDIM's steps, in words.
    """

    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    missing: tuple[str, ...]


def is_edm(scheduler: Any) -> bool:
    """Whether the scheduler is one of `EDM_SCHEDULERS`, or derives from one."""
    return is_kind(scheduler, EDM_SCHEDULERS)


def edm_steps(scheduler: Any, steps: int) -> EDMSteps:
    """Reads the timesteps and noise levels that a scheduler gives to a number of steps.

    Args:
        scheduler: One of `EDM_SCHEDULERS`. It is never changed.
        steps: The number of inference steps.

    Raises:
        ValueError: Its settings do not go with a v-prediction of data of unit variance.
    """
    name = type(scheduler).__name__
    for key, expected in (("prediction_type", "v_prediction"), ("sigma_data", 1.0)):
        found = setting(scheduler, key, expected)
        if found != expected:
            raise ValueError(f"scheduler: expected {name} with {key}={expected!r}, got {found!r}")
    stepper = copy.deepcopy(scheduler)
    stepper.set_timesteps(steps)
    timesteps = torch.as_tensor(stepper.timesteps).double().tolist()
    sigmas = torch.as_tensor(stepper.sigmas).double().tolist()
    alphas = tuple(1 / (1 + sigma**2) for sigma in sigmas)
    return EDMSteps(tuple(timesteps), alphas, ("the noise that it adds in every step", "its multistep updates"))
