"""DeepFloyd IF, first stage: diffusion of pictures of 64 x 64 pixels with a T5 text encoder (github.com/deep-floyd/IF).

As in Imagen (arXiv 2205.11487) there is no VAE. The later stages, which enlarge the picture, take it as an input and
are other pipelines.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from ..calling import NetworkAdapter
from ..denoiser import Denoiser
from ..hooks import device_of
from ..latent_space import LatentSpace, check_size
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
from .pixel import Pixels

NETWORK_OPTIONS = frozenset({"cross_attention_kwargs"})


class IFCall(NetworkAdapter):
    """Calls IF's UNet as `(x, t, cond, **kwargs)`, and drops the variance that it predicts besides."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the predicted noise, (B, 3, H, W) like x."""
        output: Tensor = self.module(x, t, encoder_hidden_states=cond, return_dict=False, **kwargs)[0]
        return output[:, : x.shape[1]]


class DeepFloydIF(Family):
    """The first stage of DeepFloyd IF, with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_embeds,
    negative_prompt_embeds, clean_caption) and `cross_attention_kwargs`. The variance that the network predicts besides
    the noise is dropped, as by the pipeline with a scheduler that does not use it.
    """

    pipelines = ("IFPipeline",)
    components = (
        *("unet", "scheduler", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "watermarker"),
    )
    required = ("unet", "scheduler")
    guidance_scale = 7.0

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        config = pipe.unet.config
        if (config.in_channels, config.out_channels) != (3, 6):
            raise ValueError(
                "pipe: expected a UNet from 3 channels to 6, the noise and its variance, got one from "
                f"{config.in_channels} to {config.out_channels}"
            )

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        guidance_scale, options = self.scale_of(request), dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        extra = take(options, NETWORK_OPTIONS)
        refuse_unknown(options, pipe, encoding_options(pipe) | NETWORK_OPTIONS)
        guided = guidance_scale > 1
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        if pipe.watermarker is not None:
            warnings.warn(
                "pipe: its watermarker is not part of the chain, so pictures have no watermark",
                RuntimeWarning,
                stacklevel=3,
            )
        cond, uncond = encode_pair(pipe, request, encoding, guided)
        config = pipe.unet.config
        halvings = 2 ** (len(config.block_out_channels) - 1)
        height, width = (config.sample_size if given is None else given for given in (request.height, request.width))
        for name, size in (("height", height), ("width", width)):
            check_size(name, size, 1, halvings)
        scale = guidance_scale if guided else 1.0
        denoiser = Denoiser(IFCall(pipe.unet), cond, uncond, scale, **own, **extra)
        space = LatentSpace(3, 1, height, width, device_of(pipe.unet), prompts=len(cond), patch=halvings)
        return Parts(denoiser, space, Pixels())
