"""`DiffusionChain`: what every solver's chain has in common, and the way there from a diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from ..chain.chain import Chain
from ..chain.evaluator import Evaluator
from ..chain.memory.strategies import Memory
from ..chain.program import Coupling
from ..diffusion.decoder import Decoder
from ..diffusion.denoiser import Denoiser
from ..diffusion.families import Family, Request, family_of
from ..diffusion.flow import is_flow
from ..diffusion.latent_space import LatentSpace
from ..diffusion.pipeline import load_pipeline
from ..diffusion.schedule import Schedule, setting
from ..frozen import level_of
from .truncated import Truncation

if TYPE_CHECKING:
    from typing_extensions import Self

MADE_BY_HAND = "this chain was not made by from_pipeline, so it does not know"


class DiffusionChain(Chain):
    """A sampler from noise to image latents, differentiable end to end. `EDICT` is one.

    Args:
        denoiser: The network with its conditions.
        schedule: The noise levels and timesteps.
        make_program: Turns the schedule into the couplings of the solver.
        evaluator: Makes the function f of the couplings of the denoiser, for solvers whose f is more than one call of
            the network. None is the denoiser itself.
        options: Those of `Chain`.

    Raises:
        TypeError: `denoiser` is no `Denoiser`, or `schedule` no `Schedule`.
    """

    num_starts: ClassVar[int] = 2
    """How many latents a chain starts from, and `optimize` changes."""
    schedule_type: ClassVar[Any] = Schedule
    """What the solver calls its schedule."""
    schedule_options: ClassVar[Mapping[str, Any]] = {}
    """Further options of `from_pipeline` that go to `read_scheduler`, with their defaults."""
    num_pictures: ClassVar[int] = 2
    """How many of the latents that a chain returns are pictures to be scored, from the first one on."""

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        make_program: Callable[[Any], Sequence[Coupling]],
        evaluator: Callable[[Denoiser], Evaluator] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(denoiser, Denoiser):
            raise TypeError(
                f"denoiser: expected a Denoiser, got {type(denoiser).__name__}; use Denoiser(unet, cond, uncond)"
            )
        if not isinstance(schedule, self.schedule_type):
            name, got = self.schedule_type.__name__, type(schedule).__name__
            raise TypeError(f"schedule: expected a {name}, got {got}; use {name}.from_scheduler(scheduler, steps)")
        super().__init__(evaluator(denoiser) if evaluator else denoiser, make_program(schedule), **options)
        self._schedule = schedule
        self._last_steps: Truncation | None = None
        self._space: LatentSpace | None = None
        self._decoder: Decoder | None = None
        self.prompts: list[str] | None = None
        """The texts that `from_pipeline` was given, which `optimize` passes to losses that name them."""

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | str = "auto",
        memory: Memory = "auto",
        *,
        height: int | None = None,
        width: int | None = None,
        family: Family | None = None,
        **options: Any,
    ) -> Self:
        """Makes the chain of a diffusers pipeline: Stable Diffusion 1, 2, XL and 3, FLUX.1, PixArt, DDPM, Wan, ...

        The pipeline's class picks the family, see docs/pipelines.md. The pipeline is read and never changed. Its
        scheduler gives the noise levels and timesteps, see `Schedule.from_scheduler`; the steps between them are this
        solver's.

        Args:
            pipe: A diffusers pipeline, for instance from `StableDiffusionPipeline.from_pretrained(...)`.
            prompt: One prompt, or a list of B prompts for a batch of B latents. None with `prompt_embeds`.
            negative_prompt: What to steer away from: one text for all prompts, or one for each. None is what the
                pipeline does without one: "" for most, no guidance for some, see docs/pipelines.md.
            num_inference_steps: The number of sampling steps. EDICT needs about 50 with its usual `mix_weight`.
            guidance_scale: The weight of classifier-free guidance (arXiv 2207.12598). As in diffusers, the prompt alone
                is used with anything up to 1, and a network that embeds the guidance scale gets it as an input. "auto"
                is the family's own: 7.5 for Stable Diffusion 1, 2 and XL, 7 for 3, 3.5 for FLUX, 4.5 for PixArt,
                5 for Wan.
            memory: What is kept for the gradient, see `Chain`. "auto" plans it by the memory that is free.
            height: Height of the pictures in pixels, for `noise` and SDXL's conditions. None is the pipeline's own.
            width: Width of the pictures in pixels.
            family: Your own adapter for a class of pipelines that is not known, see docs/adapters.md.
            **options: The solver's own options (for EDICT: mix_weight, arithmetic, state_dtype, drift_tolerance,
                memory_budget); `vjp_dtype`, `compile`, `cuda_graphs`, `trainable` and `lean` of `Denoiser`, the last of
                which holds for the decoder too; arguments of the pipeline's `encode_prompt`
                (prompt_embeds, negative_prompt_embeds, clip_skip; for SDXL prompt_2, pooled_prompt_embeds, ...);
                arguments of the UNet's `forward` (cross_attention_kwargs, added_cond_kwargs, ...); and others of the
                pipeline's own that its family names (FLUX's true_cfg_scale, or the num_frames of videos, for instance).

        Returns:
            A chain with `noise` and `decode`.

        Raises:
            TypeError: `pipe` is no such pipeline, a prompt is no text, or an option is unknown.
            ValueError: The pipeline or its scheduler has parts that would be ignored, or an option is out of range.

        Example:
            >>> chain = EDICT.from_pipeline(pipe, "a dog", guidance_scale=5.0)
            >>> x0, y0 = chain(chain.noise(seed=0))
            >>> images = chain.decode(x0)
        """
        family = family_of(pipe) if family is None else family
        family.check(pipe)
        _check_scheduler(pipe.scheduler, family)
        names = set(inspect.signature(cls.__init__).parameters) - {"self", "denoiser", "schedule", "memory"}
        solver = {name: options.pop(name) for name in sorted(names & options.keys())}
        reading = {name: options.pop(name, default) for name, default in cls.schedule_options.items()}
        request = Request(prompt, negative_prompt, num_inference_steps, guidance_scale, height, width, options)
        timesteps = family.set_timesteps(pipe, request) | reading
        schedule = cls.read_scheduler(pipe.scheduler, num_inference_steps, **timesteps)
        made = {name: getattr(schedule, name) for name in ("timesteps", "start") if hasattr(schedule, name)}
        parts = family.parts(pipe, replace(request, **made))
        chain = cls(parts.denoiser, schedule, memory=memory, **solver)
        if "lean" in options and isinstance(parts.decoder, Decoder):
            parts.decoder.lean = level_of(options["lean"])
        chain._space, chain._decoder = parts.space, parts.decoder
        chain.prompts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
        return chain

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        prompt: str | list[str] | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        **options: Any,
    ) -> Self:
        """Loads a diffusers pipeline of a family that `from_pipeline` takes, and makes its chain.

        Args:
            model: A local folder with model_index.json, or a hub id such as `org/name`. Only safetensors are read.
            prompt: One prompt, or a list of B prompts for a batch of B latents.
            device: Where the networks are put.
            dtype: Of all networks. An SDXL VAE that overflows in fp16 stays in float32.
            variant: Of the weight files, "fp16" for instance.
            **options: Further arguments of `from_pipeline`.

        Returns:
            A chain with `noise` and `decode`.

        Raises:
            TypeError: As `from_pipeline`.
            ValueError: The model cannot be loaded, or as `from_pipeline`.

        Example:
            >>> chain = EDICT.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", "a dog", device="cuda")
        """
        pipe = load_pipeline(model, device, dtype, variant, options.get("family"))
        return cls.from_pipeline(pipe, prompt, **options)

    @classmethod
    def read_scheduler(cls, scheduler: Any, num_inference_steps: int, **set_timesteps: Any) -> Any:
        """Reads what `from_pipeline` gives this solver as its schedule off a diffusers scheduler.

        Args:
            scheduler: The pipeline's scheduler.
            num_inference_steps: The number of sampling steps.
            **set_timesteps: What else the pipeline gives its scheduler's `set_timesteps`: a flow's `mu` and `sigmas`.
        """
        return cls.schedule_type.from_scheduler(scheduler, num_inference_steps, **set_timesteps)

    @property
    def last_steps(self) -> Truncation | None:
        """How gradients are truncated: a `LastSteps`, `LowVariance` or `StraightThrough`. None is the right gradient.

        Raises:
            ValueError: It is set on a chain in exact arithmetic, or does not fit the solver.
            TypeError: It is set to something else.
        """
        return self._last_steps

    @last_steps.setter
    def last_steps(self, value: Truncation | None) -> None:
        if value is not None and not isinstance(value, Truncation):
            raise TypeError(
                "last_steps: expected a LastSteps, LowVariance or StraightThrough, or None, got "
                f"{type(value).__name__}; use LastSteps(5)"
            )
        if value is not None:
            if self.arithmetic != "float":
                raise ValueError(f'last_steps: expected None with arithmetic={self.arithmetic!r}; use "float"')
            value.check(self, self._schedule)
        self._last_steps = value

    def _run_checked(self, latents: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, ...]:
        if self._last_steps is None or inverse or not torch.is_grad_enabled():
            return super()._run_checked(latents, inverse)
        return self._last_steps.run(self, self._schedule, latents)

    @property
    def picture_index(self) -> int:
        """Which of the program's values is the picture at its end: of `program` and of a `LatticeState`'s latents."""
        return 0

    @property
    def denoiser(self) -> Denoiser:
        """The network with its conditions: the chain's evaluator."""
        return cast(Denoiser, self.evaluator)

    @property
    def schedule(self) -> Schedule:
        """The noise levels and timesteps."""
        return self._schedule

    def noise(
        self,
        seed: int = 0,
        batch: int | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draws starting latents of standard normal noise.

        They are drawn in float32, on the CPU unless `generator` lies elsewhere, so that a seed means the same picture
        on every device and in every dtype. The chain's latents have unit variance at the noise end whatever the
        pipeline's scheduler: the `init_noise_sigma` of schedulers that scale their latents (Euler, for instance) is
        not applied.

        Args:
            seed: Of the noise; a generator takes its place. A list has a seed for each picture, whose noise is then
                the same in every batch.
            batch: How many latents B. None is one for each prompt of the chain, or for each seed of a list.
            height: Height of the pictures in pixels. None is that of the chain.
            width: Width of the pictures in pixels. None is that of the chain.
            num_frames: Frames of the videos. None is that of the chain, and for a chain that makes pictures.
            generator: Where the noise is drawn from instead, as in diffusers.
            device: Of the result. None is the network's.
            dtype: Of the result.

        Returns:
            Latents (B, C, height / f, width / f), where f is the VAE's scale factor. Latents of videos have frames as
            well, in the axis where the pipeline has them.

        Raises:
            ValueError: A size or the batch does not fit, or the chain was not made by `from_pipeline`.
        """
        if self._space is None:
            raise ValueError(f"noise: {MADE_BY_HAND} its latents' shape; use torch.randn(batch, channels, h, w)")
        return self._space.noise(seed, batch, height, width, generator, device, dtype, num_frames)

    def noised(self, picture: Tensor, noise: Tensor) -> Tensor:
        """Mixes a picture with noise as it is where the chain starts, differentiably in both.

        A chain that starts in the middle of the schedule (diffusers' `strength`) starts from such a mixture, and
        `noise` draws it. At the noise end the share of the picture is small, and zero for some schedules.

        Args:
            picture: The picture's latents (B or 1, C, h, w), from `chain.decode.encode` for instance.
            noise: Standard normal noise (B, C, h, w).

        Returns:
            Latents (B, C, h, w) for the chain to start from.
        """
        share, rest = self._schedule.start
        return share * picture + rest * noise

    @property
    def space(self) -> LatentSpace:
        """The shape of the pipeline's latents.

        Raises:
            AttributeError: The chain was not made by `from_pipeline`.
        """
        if self._space is None:
            raise AttributeError(f"space: {MADE_BY_HAND} its latents' shape")
        return self._space

    @property
    def decode(self) -> Decoder:
        """The pipeline's decoder: `chain.decode(latents)` gives images (B, 3, H, W) in [-1, 1], or videos.

        Videos are (B, F, 3, H, W); see `doodl_fast.diffusion.video.VideoDecoder`.

        Raises:
            AttributeError: The chain was not made by `from_pipeline`.
        """
        if self._decoder is None:
            raise AttributeError(f"decode: {MADE_BY_HAND} a VAE; use Decoder(pipe.vae)")
        return self._decoder


def _check_scheduler(scheduler: Any, family: Family) -> None:
    """Raises TypeError for a flow's scheduler where the network does not predict a velocity, and the reverse."""
    name, is_of_flow = type(scheduler).__name__, is_flow(scheduler) or setting(scheduler, "use_flow_sigmas", False)
    if is_flow(scheduler) and not family.takes_flows:
        raise TypeError(
            f"scheduler: {name} has no alphas_cumprod; flow-matching schedulers are not right for pipelines of the "
            f"family {type(family).__name__}. Make the chain by hand, of a Denoiser and "
            "Schedule.from_scheduler(scheduler, steps)"
        )
    if family.takes_flows and not is_of_flow:
        raise TypeError(
            f"scheduler: expected one of flow matching for pipelines of the family {type(family).__name__}, whose "
            f"networks predict a velocity, got {name}; use FlowMatchEulerDiscreteScheduler"
        )
