"""AnimateDiff: Stable Diffusion 1 with motion modules, which makes videos (arXiv 2307.04725)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..calling import NetworkAdapter
from ..decoder import vae_scale_factor
from ..denoiser import Denoiser
from ..prompts import encode_conditions
from ..video import FrameDecoder, VideoSpace
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
from .video_shape import video_space

FRAMES = 16
"""Frames where the caller of the pipeline gives none."""
NETWORK_OPTIONS = frozenset({"cross_attention_kwargs"})


class MotionCall(NetworkAdapter):
    """Calls a `UNetMotionModel` as `(x, t, cond, **kwargs)`, with the prompt's embeddings for each frame."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        """Returns the predicted noise, (B, C, F, h, w) like x."""
        embeddings = cond.repeat_interleave(x.shape[2], dim=0)
        output: Tensor = self.module(x, t, encoder_hidden_states=embeddings, return_dict=False, **kwargs)[0]
        return output


class AnimateDiff(Family):
    """AnimateDiff, from text to video, with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_embeds,
    negative_prompt_embeds, clip_skip, lora_scale), `num_frames` and `cross_attention_kwargs`.
    """

    pipelines = ("AnimateDiffPipeline",)
    components = (
        *("unet", "vae", "scheduler", "text_encoder", "tokenizer", "motion_adapter"),
        *("feature_extractor", "image_encoder"),
    )
    required = ("unet", "vae", "scheduler")
    guidance_scale = 7.5

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        name, config = type(pipe).__name__, pipe.unet.config
        for kind, feature in (("free_init", "FreeInit"), ("free_noise", "FreeNoise")):
            if getattr(pipe, f"{kind}_enabled", False):
                raise ValueError(
                    f"pipe: {name} has {feature}, which from_pipeline would ignore; switch it off with "
                    f"pipe.disable_{kind}()"
                )
        if config.get("encoder_hid_dim_type") == "ip_image_proj":
            raise ValueError(
                f"pipe: {name} has an IP-Adapter, which from_pipeline would ignore; remove it with "
                "pipe.unload_ip_adapter()"
            )
        if config.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(
                f"pipe: expected a UNet of {pipe.vae.config.latent_channels} input channels (the latents'), got "
                f"{config.in_channels}: models that start from a picture take more than a prompt"
            )

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        guidance_scale, options = self.scale_of(request), dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        extra = take(options, NETWORK_OPTIONS)
        options.pop("num_frames", None)
        refuse_unknown(options, pipe, encoding_options(pipe) | NETWORK_OPTIONS | {"num_frames"})
        scale = (extra.get("cross_attention_kwargs") or {}).get("scale")
        if scale is not None:  # the weight of a LoRA, of which the text encoder may have a part
            encoding.setdefault("lora_scale", scale)
        guided = guidance_scale > 1
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        space = self._space(pipe, request)
        cond, uncond, _ = encode_conditions(
            pipe, request.prompt, request.negative_prompt or "", guided=guided, **encoding
        )
        scale = guidance_scale if guided else 1.0
        denoiser = Denoiser(MotionCall(pipe.unet), cond, uncond if guided else None, scale, **own, **extra)
        return Parts(denoiser, space.for_prompts(len(cond)), FrameDecoder(pipe.vae, space))

    def _space(self, pipe: Any, request: Request) -> VideoSpace:
        """Returns the latent space."""
        config, factor = pipe.unet.config, vae_scale_factor(pipe.vae)
        side = config.sample_size * factor
        return video_space(
            pipe,
            request,
            (FRAMES, side, side),
            1,
            channels=config.in_channels,
            scale_factor=factor,
            first_is_single=False,
            most_frames=config.motion_max_seq_length,
        )
