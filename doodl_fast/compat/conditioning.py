"""Guidance during sampling, by gradients through the rest of the chain or through one step; `get_generic_cond_fn`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..chain.chain import Chain, Memory
from ..chain.evaluator import Evaluator
from ..chain.program import Program, invert
from ..diffusion.denoiser import Denoiser
from ..diffusion.pipeline import Decoder, load_pipeline
from ..diffusion.schedule import Schedule, noise_levels, setting
from ..optimization import OneStepGuidance
from ..optimization.objective import Objective
from ..solvers import edict_program
from .quirks import Quirks
from .schedule import DEFAULT, ReferenceScheduler, reference_schedule

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"


@functools.cache
def default_pipeline() -> Any:
    """The reference's model, Stable Diffusion 1.4, loaded once: in fp16 on CUDA if there is any, else in fp32 on CPU.

    Raises ValueError where it cannot be loaded.
    """
    if torch.cuda.is_available():
        return load_pipeline(DEFAULT_MODEL, "cuda", torch.float16)
    return load_pipeline(DEFAULT_MODEL)


def pipeline_schedule(pipeline: Any, steps: int, quirks: Quirks) -> Schedule:
    """Returns the reference's timesteps with the noise levels and the prediction type of a pipeline.

    Where the levels are Stable Diffusion's, which the reference takes for granted, its own copy of them is used
    (`Quirks.float64_alphas`).

    Raises:
        TypeError: The pipeline's scheduler has no noise levels.
        ValueError: The scheduler has another number of training timesteps than 1000.
    """
    scheduler = ReferenceScheduler(quirks)
    own = torch.tensor(noise_levels(pipeline.scheduler), dtype=torch.float64)
    if own.shape != scheduler.alphas_cumprod.shape:
        raise ValueError(f"pipeline: expected a scheduler of 1000 training timesteps, got {len(own)}")
    if not torch.allclose(own, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=0):
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = own, own[0]
    scheduler.config.prediction_type = setting(pipeline.scheduler, "prediction_type", "epsilon")
    scheduler.set_timesteps(steps)
    quirks = replace(quirks, ignored_prediction_type=False)
    return reference_schedule(scheduler.timesteps, scheduler, steps, quirks)


@dataclass(frozen=True)
class Sampler:
    """Chains over any stretch of a schedule, in the reference's order.

    schedule: of the whole run. steps: the number that was asked for, which may differ from the schedule's (see
    `Quirks.extra_timesteps`).
    """

    denoiser: Denoiser
    schedule: Schedule
    steps: int
    mix_weight: float = 0.93
    quirks: Quirks = DEFAULT
    memory: Memory = "checkpoint"

    def part(self, start: int = 0, stop: int | None = None) -> Schedule | None:
        """The steps from start to stop, counted from the noise; None if there are none."""
        full, place = self.schedule, slice(start, stop)
        if not full.timesteps[place]:
            return None
        return Schedule(
            full.timesteps[place], full.alphas_cumprod[place], full.alphas_cumprod_prev[place], full.prediction_type
        )

    def program(self, start: int = 0, stop: int | None = None) -> Program:
        """EDICT's steps from start to stop (see `Quirks.order_by_index`)."""
        part = self.part(start, stop)
        first = 0 if self.quirks.order_by_index else start
        return () if part is None else edict_program(part, self.mix_weight, first)

    def inverse_program(self, start: int = 0, mixed: bool = True) -> Program:
        """From the image back to step `start`, with the reference's `inverse` (see `Quirks.inverse_order_by_count`).

        mixed: whether the mixing is undone as well.
        """
        part = self.part(start)
        if part is None:
            return ()
        first = 0 if self.quirks.order_by_index else start
        if self.quirks.order_by_index and self.quirks.inverse_order_by_count:
            first = self.steps - len(part)
        return invert(edict_program(part, self.mix_weight if mixed else 1.0, first))

    def chain(self, program: Program, evaluator: Evaluator | None = None) -> Chain:
        return Chain(evaluator or self.denoiser, program, self.memory)


class ChainGuidance(OneStepGuidance):
    """A denoiser that is pulled towards a lower loss on the picture that the rest of the chain makes, by the gradient
    through all of it; otherwise as `OneStepGuidance`.

    x is the start of both latents, and the loss the mean of the two pictures'.
    """

    def __init__(self, sampler: Sampler, decode: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__(sampler.denoiser, sampler.schedule, decode, loss)
        self.sampler = sampler

    def gradient(self, x: Tensor, t: Any, latents_dtype: torch.dtype | None = None) -> Tensor:
        return self.pair_gradient([x, x], t).sum(0) * x.shape[0]

    def pair_gradient(self, pair: list[Tensor], t: Any) -> Tensor:
        """d loss / d pair, stacked: (2, B, C, h, w), in their dtype. pair: two latents (B, C, h, w) at timestep t."""
        start = self.schedule.timesteps.index(int(t))
        chain = self.sampler.chain(self.sampler.program(start))
        objective = Objective(chain, self.decode, self.loss, pair[0].dtype, members=2)
        _, _, gradients = objective.gradient(pair, start)
        return (0.5 * torch.stack(gradients)).to(pair[0].dtype)


def get_generic_cond_fn(
    loss_fn: Callable[[Tensor], Tensor],
    embedding_unconditional: Tensor,
    embedding_conditional: Tensor,
    sd_guidance_scale: float = 7.5,
    steps: int = 50,
    mix_weight: float = 0.93,
    one_step_baseline: bool = False,
    keep_input: bool = False,
    *,
    pipeline: Any = None,
    quirks: Quirks = DEFAULT,
) -> Callable[..., Tensor]:
    """`cond_fn(x, t, scheduler)`: minus the gradient of a loss on the final picture with respect to latents.

    loss_fn: images (B, 3, H, W) in [-1, 1] -> 0-dim loss. embedding_...: (1, tokens, features). steps, mix_weight: of
    the chain. one_step_baseline: the picture is predicted in one step. keep_input: of no effect: what the gradient
    needs is kept. pipeline: whose UNet and VAE; default: Stable Diffusion 1.4's.

    x: (1, C, h, w), the start of both latents, or a pair of them (2, C, h, w), whose gradients are then both returned.
    t: one of the scheduler's timesteps, a number or a tensor of one element. scheduler: what the loop steps with.
    """
    pipeline = default_pipeline() if pipeline is None else pipeline
    denoiser = Denoiser(
        pipeline.unet, embedding_conditional, embedding_unconditional, sd_guidance_scale, guide_below_one=True
    )
    schedule = pipeline_schedule(pipeline, steps, quirks)
    sampler = Sampler(denoiser, schedule, steps, mix_weight, quirks)
    guidance = ChainGuidance(sampler, Decoder(pipeline.vae), loss_fn)
    one_step = OneStepGuidance(denoiser, schedule, guidance.decode, loss_fn)

    def cond_fn(x: Tensor, t: int | Tensor, scheduler: Any = None) -> Tensor:
        if int(t) not in schedule.timesteps:
            raise ValueError(f"t: expected one of the {len(schedule)} timesteps of {steps} steps, got {int(t)}")
        if one_step_baseline:
            return -one_step.gradient(x, t)
        if x.shape[0] == 2:
            return -guidance.pair_gradient(list(x.split(1)), t).flatten(0, 1)
        return -guidance.gradient(x, t)

    return cond_fn
