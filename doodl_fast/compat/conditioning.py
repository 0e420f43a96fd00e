"""Guidance during sampling, by gradients through the rest of the chain or through one prediction of the picture."""

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
    """Loads Stable Diffusion 1.4, as the reference does, once: in fp16 on CUDA if there is any, else in fp32.

    Raises:
        ValueError: The model cannot be loaded.
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
    """Makes chains over any part of a schedule, in which x and y alternate as in the reference.

    Attributes:
        denoiser: The network with its conditions.
        schedule: The schedule of the whole run.
        steps: The number of steps that was asked for; the schedule may have another (`Quirks.extra_timesteps`).
        mix_weight: EDICT's mixing weight.
        quirks: Which peculiarities of the reference are reproduced.
        memory: What the chains keep for their gradients, see `doodl_fast.EDICT`.
    """

    denoiser: Denoiser
    schedule: Schedule
    steps: int
    mix_weight: float = 0.93
    quirks: Quirks = DEFAULT
    memory: Memory = "checkpoint"

    def part(self, start: int = 0, stop: int | None = None) -> Schedule | None:
        """Returns the steps from start to stop, counted from the noise; None if there are none."""
        full, place = self.schedule, slice(start, stop)
        if not full.timesteps[place]:
            return None
        return Schedule(
            full.timesteps[place], full.alphas_cumprod[place], full.alphas_cumprod_prev[place], full.prediction_type
        )

    def program(self, start: int = 0, stop: int | None = None) -> Program:
        """Returns the couplings of EDICT's steps from start to stop (see `Quirks.order_by_index`)."""
        part = self.part(start, stop)
        first = 0 if self.quirks.order_by_index else start
        return () if part is None else edict_program(part, self.mix_weight, first)

    def inverse_program(self, start: int = 0, mixed: bool = True) -> Program:
        """Returns the couplings that lead from the image back to step `start`, as the reference's `inverse` does them.

        Args:
            start: The step, counted from the noise.
            mixed: Whether the mixing is undone as well. See also `Quirks.inverse_order_by_count`.
        """
        part = self.part(start)
        if part is None:
            return ()
        first = 0 if self.quirks.order_by_index else start
        if self.quirks.order_by_index and self.quirks.inverse_order_by_count:
            first = self.steps - len(part)
        return invert(edict_program(part, self.mix_weight if mixed else 1.0, first))

    def chain(self, program: Program, evaluator: Evaluator | None = None) -> Chain:
        """Returns a chain of these couplings, with the denoiser or another evaluator."""
        return Chain(evaluator or self.denoiser, program, self.memory)


class ChainGuidance(OneStepGuidance):
    """A denoiser that is guided by the gradient of a loss through the whole rest of the chain.

    It works like `OneStepGuidance`, except that the picture is made by the remaining steps. Both latents start from x,
    and the loss is the mean of the losses of the two pictures.

    Args:
        sampler: Makes the chain of the remaining steps.
        decode: The decoder.
        loss: A function of images (B, 3, H, W) in [-1, 1], with a 0-dim result.
    """

    def __init__(self, sampler: Sampler, decode: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__(sampler.denoiser, sampler.schedule, decode, loss)
        self.sampler = sampler

    def gradient(self, x: Tensor, t: Any, latents_dtype: torch.dtype | None = None) -> Tensor:
        """Returns the gradient of the loss with respect to the latents x at timestep t, of their shape."""
        return self.pair_gradient([x, x], t).sum(0) * x.shape[0]

    def pair_gradient(self, pair: list[Tensor], t: Any) -> Tensor:
        """Returns the gradients of the loss with respect to two latents.

        Args:
            pair: The two latents at timestep t, each of shape (B, C, h, w).
            t: The timestep.

        Returns:
            Both gradients, of shape (2, B, C, h, w), in the dtype of the latents.
        """
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
    """Makes a function that returns minus the gradient of a loss on the final picture with respect to latents.

    Args:
        loss_fn: A function of images (B, 3, H, W) in [-1, 1], with a 0-dim result.
        embedding_unconditional: The embedding of the negative prompt, of shape (1, L, D).
        embedding_conditional: The embedding of the prompt, of shape (1, L, D).
        sd_guidance_scale: The scale of classifier-free guidance.
        steps: The number of sampling steps.
        mix_weight: EDICT's mixing weight.
        one_step_baseline: Whether the picture is predicted in one step, instead of by the rest of the chain.
        keep_input: It has no effect, because what the gradient needs is always kept.
        pipeline: A pipeline whose UNet and VAE are used. By default it is that of Stable Diffusion 1.4.
        quirks: Which peculiarities of the reference are reproduced.

    Returns:
        A function `cond_fn(x, t, scheduler=None)`. x are latents (1, C, h, w) that both variables start from, or two of
        them, (2, C, h, w), whose gradients are then both returned. t is one of the timesteps, a number or a tensor of
        one element; any other is a ValueError. The scheduler is not used.
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
