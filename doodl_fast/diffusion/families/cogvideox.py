"""CogVideoX: diffusion of videos with a transformer that predicts v (arXiv 2408.06072)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ..chunked_decoder import ChunkedVideoDecoder, Recomputed
from ..decoder import vae_scale_factor
from ..denoiser import Denoiser
from ..video import VideoSpace
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
from .encoding import encode_pair
from .transformer import TransformerCall
from .video_shape import video_space

OTHER_OPTIONS = frozenset({"num_frames", "use_dynamic_cfg"})
NETWORK_OPTIONS = frozenset({"attention_kwargs"})


@dataclass(frozen=True)
class DynamicGuidance:
    """The guidance of `use_dynamic_cfg`, whose scale follows a cosine of the timestep.

    Attributes:
        steps: The number of inference steps.
    """

    steps: int

    def __call__(self, uncond: Tensor, cond: Tensor, guidance_scale: float, t: Tensor) -> Tensor:
        """Returns the combined prediction. See `Denoiser`."""
        # The argument of the cosine reaches millions, so it is computed in Python's floats, as in the pipeline.
        turns = ((self.steps - t.item()) / self.steps) ** 5.0
        scale = 1 + guidance_scale * (1 - math.cos(math.pi * turns)) / 2
        return uncond + scale * (cond - uncond)


class CogVideoXCall(TransformerCall):
    """Calls CogVideoX's transformer as `(x, t, cond, **kwargs)`, with its rotary embeddings."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the predicted v, (B, F, C, h, w) like x."""
        from diffusers import CogVideoXPipeline

        rotary = None
        config: Any = self.module.config
        if config.use_rotary_positional_embeddings:
            # The pipeline's own method, for latents in the place of pixels.
            owner: Any = SimpleNamespace(vae_scale_factor_spatial=1, transformer=self.module)
            frames, _, height, width = x.shape[1:]
            rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(owner, height, width, frames, x.device)
        return super().__call__(x, t, cond, image_rotary_emb=rotary, **kwargs)


class CogVideoXDecoder(ChunkedVideoDecoder):
    """The decoder of CogVideoX's VAE, which is causal and takes a few frames of the latents at a time."""

    wrapper = Recomputed

    def _needed(self, frames: int, total: int) -> int:
        # The first group has the frames that are left over, so the groups are the same only if as many are.
        group = self.vae.num_latent_frames_batch_size
        if total < group:
            return total
        return max(frames + (total - frames) % group, group + total % group)


class CogVideoX(Family):
    """CogVideoX and CogVideoX 1.5, from text to video, with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_embeds,
    negative_prompt_embeds, max_sequence_length), `num_frames`, `use_dynamic_cfg` and `attention_kwargs`.
    """

    pipelines = ("CogVideoXPipeline",)
    components = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    guidance_scale = 6.0

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        channels, expected = pipe.transformer.config.in_channels, pipe.vae.config.latent_channels
        if channels != expected:
            raise ValueError(
                f"pipe: expected a transformer of {expected} input channels (the latents'), got {channels}: models "
                "that start from a picture or a video take more than a prompt"
            )

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        guidance_scale, options = self.scale_of(request), dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        extra, others = take(options, NETWORK_OPTIONS), take(options, OTHER_OPTIONS)
        refuse_unknown(options, pipe, encoding_options(pipe) | NETWORK_OPTIONS | OTHER_OPTIONS)
        guided, is_dynamic = guidance_scale > 1, bool(others.get("use_dynamic_cfg"))
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        if is_dynamic and not guided:
            raise ValueError(f"use_dynamic_cfg: expected False, because guidance_scale is {guidance_scale:g}, got True")
        space = self._space(pipe, request)
        cond, uncond = encode_pair(pipe, request, encoding, guided)
        config = pipe.transformer.config
        if not config.use_rotary_positional_embeddings and cond.shape[1] != config.max_text_seq_length:
            raise ValueError(
                f"prompt_embeds: expected {config.max_text_seq_length} tokens, for which the network has positions, "
                f"got {cond.shape[1]}; max_sequence_length is how many a prompt is encoded into"
            )
        combine = DynamicGuidance(request.num_inference_steps) if is_dynamic else None
        scale = guidance_scale if guided else 1.0
        denoiser = Denoiser(CogVideoXCall(pipe.transformer), cond, uncond, scale, combine=combine, **own, **extra)
        return Parts(denoiser, space.for_prompts(len(cond)), CogVideoXDecoder(pipe.vae, space))

    def _space(self, pipe: Any, request: Request) -> VideoSpace:
        """Returns the latent space. CogVideoX 1.5 wants a multiple of its patch's frames, and drops the rest."""
        config, factor = pipe.transformer.config, vae_scale_factor(pipe.vae)
        defaults = config.sample_frames, config.sample_height * factor, config.sample_width * factor
        shape = {
            "channels": config.in_channels,
            "scale_factor": factor,
            "frame_factor": int(pipe.vae.config.temporal_compression_ratio),
            "frame_group": int(pipe.vae.num_latent_frames_batch_size),
            "frames_first": True,
        }
        space = video_space(pipe, request, defaults, config.patch_size, **shape)
        padding = -space.latent_frames() % (config.patch_size_t or 1)
        return video_space(pipe, request, defaults, config.patch_size, padding=padding, **shape)
