"""Steps that carry something on which only the scheduler sees are read off with a bounded history."""

from __future__ import annotations

import diffusers
import pytest
import torch
from conftest import golden_denoiser, latents, relative
from tolerances import FP32

from doodl_fast.diffusion.tracing import SamplerSteps
from doodl_fast.solvers.linear_steps import linear_program
from doodl_fast.solvers.sampler import Sampler

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "options", [{}, {"solver_order": 3}, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}], ids=str
)
@pytest.mark.parametrize("steps", [3, 20, 60])
def test_unipc_has_a_bounded_history(steps: int, options: dict) -> None:
    """Its corrected latents depend on all outputs so far, but the latents at the start of a step stand for these."""
    scheduler = diffusers.UniPCMultistepScheduler(**STABLE_DIFFUSION, **options)
    read = SamplerSteps.from_scheduler(scheduler, steps)
    assert max(len(step.result) for step in read.steps) <= 12
    layout = linear_program(read.steps)
    assert layout.slots <= 13 and len(layout.program) <= 11 * steps


def test_long_chains_are_still_diffusers() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**STABLE_DIFFUSION)
    denoiser, x = golden_denoiser(torch.float64), latents(1, 4, 16, 16)[0]
    (found,) = Sampler(denoiser, SamplerSteps.from_scheduler(scheduler, 30))(x)
    scheduler.set_timesteps(30)
    expected = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected = scheduler.step(denoiser(expected, t), t, expected).prev_sample
    assert relative(found, expected) < FP32 < relative(expected, x)
