"""FLUX.2 dev and klein: a flow on latents that the VAE's batch norm scales, in patches of 2 x 2.

A chain carries the patches as pictures of fewer pixels and more channels, (B, 128, h / 2, w / 2), which is the shape in
which the pipelines draw and take their noise. `pack` gives what they return as their latents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calling import NetworkAdapter
from ..decoder import Decoder, latent_channels, vae_scale_factor
from ..denoiser import Denoiser
from ..hooks import device_of
from ..images import check_images
from .base import (
    DENOISER_OPTIONS,
    Family,
    Parts,
    Request,
    encoding_options,
    refuse_unknown,
    say,
    take,
    warn_unused_negative_prompt,
)
from .flux import PATCH, TRAINING_STEPS
from .transformer import check_prompts, even_sigmas, no_grad_encode, transformer_space

NETWORK_OPTIONS = frozenset({"attention_kwargs"})
NEGATIVE = frozenset({"negative_prompt_embeds"})
OTHER_OPTIONS = frozenset({"sigmas"})


def pack(latents: Tensor) -> Tensor:
    """Returns latents (B, C, h, w) as the rows (B, h w, C) that FLUX.2's pipelines return."""
    return latents.flatten(2).transpose(1, 2)


class Flux2Call(NetworkAdapter):
    """Calls FLUX.2's transformer as `(x, t, cond, **kwargs)` on latents (B, C, h, w)."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        """Returns the network's prediction, (B, C, h, w) like x."""
        output: Tensor = self.module(
            hidden_states=pack(x),
            timestep=t.expand(len(x)).to(x.dtype) / TRAINING_STEPS,
            encoder_hidden_states=cond,
            txt_ids=_places(1, 1, cond.shape[1], x.device),
            img_ids=_places(x.shape[-2], x.shape[-1], 1, x.device),
            return_dict=False,
            **kwargs,
        )[0]
        return output.transpose(1, 2).reshape(x.shape)


def _places(rows: int, columns: int, tokens: int, device: torch.device) -> Tensor:
    """Returns the places (rows columns tokens, 4) of patches, by time, row and column, or of tokens of a text."""
    ranges = [torch.arange(count, device=device) for count in (1, rows, columns, tokens)]
    return torch.cartesian_prod(*ranges)


class PatchDecoder(Decoder):
    """FLUX.2's VAE, for latents (B, 128, h / 2, w / 2) that are patches scaled by the VAE's batch norm."""

    def __call__(self, latents: Tensor) -> Tensor:
        """See `Decoder`."""
        check_images(latents, "latents", PATCH**2 * latent_channels(self.vae))
        return self._decoded(latents)

    def _images(self, z: Tensor) -> Tensor:
        batch, channels, height, width = z.shape
        patches = z.reshape(batch, channels // PATCH**2, PATCH, PATCH, height, width).permute(0, 1, 4, 2, 5, 3)
        return super()._images(patches.reshape(batch, -1, height * PATCH, width * PATCH))

    def _encode(self, images: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        latents = super()._encode(images, sample, generator)
        batch, channels, height, width = latents.shape
        patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        return patches.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // PATCH, width // PATCH)

    def _pixels(self) -> int:
        return super()._pixels() * PATCH

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        mean, variance = (values.to(like).reshape(1, -1, 1, 1) for values in (norm.running_mean, norm.running_var))
        deviation = (variance + self.vae.config.batch_norm_eps).sqrt()
        return 1 / deviation, -mean / deviation


class Flux2(Family):
    """FLUX.2 dev, whose network takes the guidance scale as an input, and klein, which is guided classifier-free.

    Beside the arguments of `from_pipeline` it takes `prompt_embeds`, `max_sequence_length`, `text_encoder_out_layers`,
    `sigmas` and `attention_kwargs`; for klein also `negative_prompt_embeds`.
    """

    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    components = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    guidance_scale = 4.0
    takes_flows = True

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe, ("transformer", "vae", "scheduler"))

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        height, width = self.size(pipe, request)
        pixels = vae_scale_factor(pipe.vae) * PATCH
        options: dict[str, Any] = dict(even_sigmas(pipe.scheduler, request))
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            tokens = (height // pixels) * (width // pixels)
            options["mu"] = empirical_shift(tokens, request.num_inference_steps)
        return options

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        scale, options = self.scale_of(request), dict(request.options)
        is_klein = "is_distilled" in pipe.config
        negative_names = NEGATIVE if is_klein else frozenset()
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        extra, negative = take(options, NETWORK_OPTIONS), take(options, negative_names)
        take(options, OTHER_OPTIONS)
        refuse_unknown(options, pipe, encoding_options(pipe) | NETWORK_OPTIONS | negative_names | OTHER_OPTIONS)
        config = pipe.transformer.config
        is_dynamic = bool(pipe.scheduler.config.get("use_dynamic_shifting"))
        fixed_by = "this chain's schedule is for (use_dynamic_shifting)" if is_dynamic else None
        space = transformer_space(pipe, self.size(pipe, request), config.in_channels, PATCH, fixed_by=fixed_by)
        space = replace(space, scale_factor=space.scale_factor * PATCH, patch=1)
        guided = is_klein and not pipe.config.is_distilled and scale > 1
        if not guided:
            why = f"with guidance_scale={scale:g}" if is_klein and not pipe.config.is_distilled else "by this network"
            warn_unused_negative_prompt(request, f"{why}, which has no classifier-free guidance")
        embeds = not is_klein and config.guidance_embeds
        if not embeds and not guided and request.guidance_scale != "auto" and scale != 1:
            say(
                f"guidance_scale: {scale:g} is not used, because this network does not embed it and is not guided "
                "classifier-free"
            )
        if embeds:
            extra["guidance"] = torch.full([1], scale, device=device_of(pipe.transformer))
        if "attention_kwargs" in extra:
            extra["joint_attention_kwargs"] = extra.pop("attention_kwargs")
        cond, uncond = self._encode(pipe, request, encoding, negative, guided)
        denoiser = Denoiser(Flux2Call(pipe.transformer), cond, uncond, scale if guided else 1.0, **own, **extra)
        return Parts(denoiser, space.for_prompts(len(cond)), PatchDecoder(pipe.vae))

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """Returns the height and width of a picture in pixels."""
        own = pipe.default_sample_size * vae_scale_factor(pipe.vae)
        return own if request.height is None else request.height, own if request.width is None else request.width

    def _encode(
        self, pipe: Any, request: Request, encoding: dict[str, Any], negative: dict[str, Any], guided: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the embeddings of the prompts, and those of the negative prompts."""
        encoders = ("text_encoder", "tokenizer")
        prompts, negatives = check_prompts(pipe, request, {**encoding, **negative}, guided, None, encoders)
        given, device = encoding.pop("prompt_embeds", None), device_of(pipe.transformer)
        # The embeddings that are given need no encoding, which would cut their graph.
        cond = no_grad_encode(pipe, prompt=prompts, **encoding)[0] if given is None else given.to(device)
        if not guided:
            return cond, None
        other = negative.get("negative_prompt_embeds")
        return cond, no_grad_encode(pipe, prompt=negatives, **encoding)[0] if other is None else other.to(device)


def empirical_shift(tokens: int, steps: int) -> float:
    """Returns FLUX.2's `mu` for a picture of that many patches, and a number of steps.

    It is one line in the number of patches for 10 steps and another for 200, and is interpolated linearly between them.
    Pictures of more than 4300 patches have that of 200 steps.
    """
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else many + (many - few) / 190 * (steps - 200)
