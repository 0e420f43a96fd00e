"""Chains that sample as a diffusers scheduler does: DPM-Solver++, UniPC, Euler, LCM, ancestral samplers, flows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..chain.memory.strategies import Memory
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import Schedule
from ..diffusion.tracing import SamplerSteps
from .base import DiffusionChain
from .linear_steps import linear_program
from .step_noise import draw_noise


class Sampler(DiffusionChain):
    """The sampler of a diffusers scheduler, differentiable end to end.

    It gives the pictures that the pipeline gives, and their gradient, for every scheduler whose steps are linear in the
    network's output. The coefficients are read off the scheduler itself (see `SamplerSteps`), so there is no formula of
    any sampler here. In return there is no inverse: use `EDICT`, `BDIA` or `OBELM` to edit a given picture.

    Schedulers that add noise (ancestral samplers, DDPM, LCM, SDE solvers) take it as an input, `chain(x, noise=[...])`,
    with a gradient for every tensor of it, as DNO (arXiv 2405.18881) needs to optimise it. `draw_noise` draws it.

    `from_pipeline` has one more option, `eta` of the pipelines: how much noise `DDIMScheduler` and `TCDScheduler` add,
    from 0, the default, to 1.

    Args:
        denoiser: The network with its conditions.
        schedule: The steps, from `SamplerSteps.from_scheduler(scheduler, num_inference_steps)`; or a `Schedule` that
            was read off a diffusers scheduler, whose own steps are then taken.
        memory: What is kept for the gradient: "checkpoint", "naive" or "auto", see `Chain`. The strategies that undo
            couplings are refused.
        state_dtype: In which the latents and their cotangents are carried, see `Chain`.
        arithmetic: "float". Exact arithmetic is refused, because there is no inverse.
        memory_budget: For memory="auto", see `Chain`.

    Raises:
        TypeError: `denoiser` is no `Denoiser`, or `schedule` neither `SamplerSteps` nor a `Schedule`.
        ValueError: An option is out of range, `memory` would undo couplings, or a `Schedule` was not read off a
            scheduler of diffusers.

    Example:
        >>> pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        >>> chain = Sampler.from_pipeline(pipe, "a dog", num_inference_steps=20)
        >>> (x0,) = chain(chain.noise(seed=0))
    """

    num_starts = 1
    num_pictures = 1
    schedule_type = SamplerSteps
    schedule_options: ClassVar[Mapping[str, Any]] = {"eta": 0.0}

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: SamplerSteps | Schedule,
        memory: Memory = "checkpoint",
        state_dtype: torch.dtype | None = None,
        arithmetic: str = "float",
        memory_budget: int | str | None = None,
    ) -> None:
        if isinstance(schedule, Schedule):
            schedule = self._steps_of(schedule)
        super().__init__(
            denoiser,
            schedule,  # type: ignore[arg-type]
            lambda steps: linear_program(steps.steps, steps.initial_scale).program,
            memory=memory,
            state_dtype=state_dtype,
            arithmetic=arithmetic,
            memory_budget=memory_budget,
        )
        self._steps = schedule
        self._layout = linear_program(schedule.steps, schedule.initial_scale)
        self.step_noise: Sequence[Tensor] | None = None
        """The noise of calls that are given none: `optimize` calls the chain with latents alone."""

    @classmethod
    def read_scheduler(
        cls, scheduler: Any, num_inference_steps: int, eta: float | None = None, **options: Any
    ) -> SamplerSteps:
        """Reads the scheduler's own steps.

        Args:
            scheduler: A diffusers scheduler.
            num_inference_steps: As in `scheduler.set_timesteps`.
            eta: That of `scheduler.step`. None is the scheduler's default, which for `TCDScheduler` is not the 0 of
                the pipelines.
            **options: Those of `SamplerSteps.from_scheduler`.

        Raises:
            ValueError: `eta` is given, is not 0, and the scheduler has none.
        """
        if eta is not None and "eta" in inspect.signature(scheduler.step).parameters:
            options["step_options"] = {**options.get("step_options", {}), "eta": eta}
        elif eta:
            raise ValueError(f"eta: expected 0 with {type(scheduler).__name__}, whose steps have no eta, got {eta!r}")
        return SamplerSteps.from_scheduler(scheduler, num_inference_steps, **options)

    @classmethod
    def _steps_of(cls, schedule: Schedule) -> SamplerSteps:
        """The steps of the scheduler that a schedule was read off."""
        if schedule.origin is None:
            raise ValueError(
                f"schedule: expected one that was read off a diffusers scheduler, got {schedule!r}, which was made by "
                "hand; use SamplerSteps.from_scheduler(scheduler, steps), or DDIM"
            )
        origin = schedule.origin
        return cls.read_scheduler(origin.scheduler, origin.num_inference_steps, **origin.options)

    @property
    def picture_index(self) -> int:
        """Which of the program's values holds the picture after the last step."""
        return self._layout.result

    @property
    def num_draws(self) -> int:
        """How many tensors of noise the steps add, 0 for a deterministic sampler."""
        return len(self._layout.noise_slots)

    def draw_noise(self, x: Tensor, seed: int = 0, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draws the noise that the steps add, in the order of the steps.

        Args:
            x: The starting latents (B, C, ...), whose shape, dtype and device the noise gets.
            seed: Of the noise, unless there is a generator. It is drawn in float32 on the CPU, so that a seed means the
                same noise everywhere.
            generator: Where it is drawn from instead. In the state in which the pipeline would have it, it gives the
                pipeline's own noise.

        Returns:
            `num_draws` tensors like x.
        """
        return draw_noise(self.num_draws, x, seed, generator)

    def __call__(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> tuple[Tensor]:  # type: ignore[override]
        """Samples.

        Args:
            x: Starting latents (B, C, ...) of standard normal noise.
            noise: The noise that the steps add, `num_draws` tensors like x. Each gets a gradient if it requires grad.
                None is `step_noise`.

        Returns:
            A tuple of one: the picture's latents, alike in shape and dtype.

        Raises:
            ValueError: There is more or less noise than the steps add, or it is not like x.
        """
        noise = self.step_noise if noise is None else noise
        given = () if noise is None else tuple(noise)
        if len(given) != self.num_draws:
            raise ValueError(
                f"noise: expected {self.num_draws} tensors, as {self._steps.name} adds noise that often, got "
                f"{'none' if noise is None else len(given)}; use noise=chain.draw_noise(x)"
            )
        rest = self._layout.slots - 1 - len(given)
        ends = self.run(x, *given, *(torch.zeros_like(x) for _ in range(rest)))
        return (ends[self.picture_index],)


class _Named(Sampler):
    """A sampler of one kind of diffusers scheduler, which is made from the settings of any other."""

    scheduler_class: ClassVar[str]

    @classmethod
    def read_scheduler(
        cls, scheduler: Any, num_inference_steps: int, eta: float | None = None, **options: Any
    ) -> SamplerSteps:
        """Reads the steps of this solver's scheduler, which gets the settings of the pipeline's.

        Raises:
            ValueError: The pipeline's scheduler is one of flow matching, whose settings mean something else; or as
                `Sampler.read_scheduler`.
        """
        import diffusers

        kind = getattr(diffusers, cls.scheduler_class)
        if type(scheduler).__name__.startswith("FlowMatch"):
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} cannot be turned into a {cls.scheduler_class}, whose settings "
                "for a flow are others; put the scheduler that you want into pipe.scheduler and use Sampler"
            )
        own = scheduler if isinstance(scheduler, kind) else kind.from_config(scheduler.config)
        return super().read_scheduler(own, num_inference_steps, eta, **options)


class DPMSolver(_Named):
    """DPM-Solver++ 2M (Lu et al., arXiv 2211.01095), of second order, with one network call for each step.

    `from_pipeline` makes diffusers' `DPMSolverMultistepScheduler` of the settings of the pipeline's scheduler.
    Everything else is as in `Sampler`.
    """

    scheduler_class = "DPMSolverMultistepScheduler"


class UniPC(_Named):
    """UniPC (Zhao et al., arXiv 2302.04867), a predictor and corrector with one network call for each step.

    `from_pipeline` makes diffusers' `UniPCMultistepScheduler` of the settings of the pipeline's scheduler.
    Everything else is as in `Sampler`.
    """

    scheduler_class = "UniPCMultistepScheduler"


class LCM(_Named):
    """The sampler of latent consistency models (Luo et al., arXiv 2310.04378): few steps, with noise between them.

    `from_pipeline` makes diffusers' `LCMScheduler` of the settings of the pipeline's scheduler.
    Everything else is as in `Sampler`.
    """

    scheduler_class = "LCMScheduler"
