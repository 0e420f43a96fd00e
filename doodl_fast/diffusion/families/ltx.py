"""LTX-Video: a flow of videos whose transformer takes packed latents (arXiv 2501.00103).

A chain carries the latents as videos (B, C, F, h, w); they are packed for each call of the network alone. `pack` gives
what the pipeline itself returns as its latents.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..calling import NetworkAdapter
from ..denoiser import Denoiser
from ..module_copies import frozen_copy
from ..video import VideoDecoder, VideoSpace
from .base import (
    DENOISER_OPTIONS,
    Family,
    Parts,
    Request,
    encoding_options,
    refuse_unknown,
    take,
    warn_unused_negative_prompt,
)
from .encoding import encode_masked_pair
from .transformer import dynamic_shift
from .video_shape import video_space

DEFAULTS = (161, 512, 704)
"""Frames, height and width where the caller of the pipeline gives none."""
FRAME_RATE = 25
MAX_SHIFT = 1.15
OTHER_OPTIONS = frozenset({"num_frames", "frame_rate", "decode_timestep", "decode_noise_scale"})
NETWORK_OPTIONS = frozenset({"attention_kwargs"})


def pack(latents: Tensor) -> Tensor:
    """Packs latents (B, C, F, h, w) into tokens (B, F * h * w, C), as LTX's pipelines have them."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Undoes `pack`.

    Args:
        tokens: (B, F * h * w, C).
        frames: Frames F of the latents.
        height: Rows h of the latents.
        width: Columns w of the latents.

    Returns:
        Latents (B, C, F, h, w).
    """
    return tokens.transpose(1, 2).unflatten(2, (frames, height, width))


class LTXCall(NetworkAdapter):
    """Calls LTX's transformer as `(x, t, cond, **kwargs)` on latents that are not packed."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        """Returns the predicted velocity, (B, C, F, h, w) like x."""
        frames, height, width = x.shape[2:]
        output = self.module(
            hidden_states=pack(x),
            encoder_hidden_states=cond,
            timestep=t.expand(len(x)),
            num_frames=frames,
            height=height,
            width=width,
            return_dict=False,
            **kwargs,
        )[0]
        return unpack(output, frames, height, width)


class LTXDecoder(VideoDecoder):
    """The decoder of LTX's VAE, which may take a timestep and remove the last of the noise itself.

    It is not causal, so some frames cost as much as the whole video.

    Args:
        vae: The VAE.
        space: The shape of the latents.
        timestep: At which it decodes, from 0 to 1; None for a VAE that takes none.
        noise_scale: The share of noise in what it decodes. The noise is that of seed 0, the same in every call.
    """

    def __init__(self, vae: Any, space: VideoSpace, timestep: float | None, noise_scale: float) -> None:
        super().__init__(vae, space)
        self._timestep, self._noise_scale = timestep, noise_scale

    def _decode(self, z: Tensor) -> Tensor:
        if self._noise_scale:
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
            z = (1 - self._noise_scale) * z + self._noise_scale * noise
        return super()._decode(z)

    def _images(self, z: Tensor) -> Tensor:
        timestep = None if self._timestep is None else z.new_full([len(z)], self._timestep)
        with frozen_copy(self.vae, self._checkpoints) as vae:
            images: Tensor = vae.decode(z, timestep, return_dict=False)[0]
        return images

    def _affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        means, deviations = (
            buffer.to(like).reshape(1, -1, 1, 1, 1) for buffer in (self.vae.latents_mean, self.vae.latents_std)
        )
        scale = self.vae.config.scaling_factor / deviations
        return scale, -scale * means


class LTX(Family):
    """LTX-Video, from text to video, with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_embeds and
    prompt_attention_mask, their negative companions, max_sequence_length), `num_frames`, `frame_rate`,
    `decode_timestep`, `decode_noise_scale` and `attention_kwargs`.
    """

    pipelines = ("LTXPipeline",)
    components = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    guidance_scale = 3.0
    takes_flows = True

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        config, expected = pipe.transformer.config, pipe.vae.config.latent_channels
        if (config.patch_size, config.patch_size_t, config.in_channels) != (1, 1, expected):
            raise ValueError(
                f"pipe: expected a transformer with patch_size=1, patch_size_t=1 and {expected} input channels (the "
                f"latents'), got {config.patch_size}, {config.patch_size_t} and {config.in_channels}"
            )
        if any(pipe.vae.config.decoder_inject_noise):
            warnings.warn(
                "pipe: its VAE has decoder_inject_noise, so it draws noise from PyTorch's global random state whenever "
                "it decodes, and two calls of chain.decode differ",
                RuntimeWarning,
                stacklevel=3,
            )

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        steps, space = request.num_inference_steps, self._space(pipe, request)
        rows, columns = space.height // space.scale_factor, space.width // space.scale_factor
        shift = dynamic_shift(pipe.scheduler, space.latent_frames() * rows * columns, MAX_SHIFT)
        return {**shift, "sigmas": torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()}

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        guidance_scale, options = self.scale_of(request), dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        extra, others = take(options, NETWORK_OPTIONS), take(options, OTHER_OPTIONS)
        refuse_unknown(options, pipe, encoding_options(pipe) | NETWORK_OPTIONS | OTHER_OPTIONS)
        guided = guidance_scale > 1
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        space = self._space(pipe, request)
        cond, uncond, mask = encode_masked_pair(pipe, request, encoding, guided)
        interpolation = (
            space.frame_factor / number("frame_rate", others.get("frame_rate", FRAME_RATE), is_positive=True),
            space.scale_factor,
            space.scale_factor,
        )
        denoiser = Denoiser(
            LTXCall(pipe.transformer),
            cond,
            uncond,
            guidance_scale if guided else 1.0,
            encoder_attention_mask=mask,
            rope_interpolation_scale=interpolation,
            **own,
            **extra,
        )
        return Parts(denoiser, space.for_prompts(len(cond)), self._decoder(pipe, space, others))

    def _space(self, pipe: Any, request: Request) -> VideoSpace:
        """Returns the latent space."""
        is_dynamic = bool(pipe.scheduler.config.get("use_dynamic_shifting"))
        fixed_by = {"fixed_by": "this chain's schedule is for (use_dynamic_shifting)"} if is_dynamic else {}
        return video_space(
            pipe,
            request,
            DEFAULTS,
            1,
            channels=pipe.vae.config.latent_channels,
            scale_factor=pipe.vae.spatial_compression_ratio,
            frame_factor=pipe.vae.temporal_compression_ratio,
            fixed_size=is_dynamic,
            **fixed_by,
        )

    def _decoder(self, pipe: Any, space: VideoSpace, options: dict[str, Any]) -> LTXDecoder:
        """Returns the decoder at the timestep and with the noise that are asked for."""
        given = {name: options.get(name) for name in ("decode_timestep", "decode_noise_scale")}
        if not pipe.vae.config.timestep_conditioning:
            for name, value in given.items():
                if value is not None:
                    raise ValueError(
                        f"{name}: expected None because the VAE has timestep_conditioning=False, got {value!r}"
                    )
            return LTXDecoder(pipe.vae, space, None, 0.0)
        timestep = number("decode_timestep", 0.0 if given["decode_timestep"] is None else given["decode_timestep"])
        scale = given["decode_noise_scale"]
        return LTXDecoder(pipe.vae, space, timestep, timestep if scale is None else number("decode_noise_scale", scale))


def number(name: str, value: Any, is_positive: bool = False) -> float:
    """Returns an option that is a number of at least 0, or above 0. Raises TypeError or ValueError for others."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if value < 0 or (is_positive and value == 0):
        raise ValueError(f"{name}: expected a number {'above' if is_positive else 'of at least'} 0, got {value!r}")
    return float(value)
