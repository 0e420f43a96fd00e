"""PixArt-alpha and PixArt-sigma: diffusion with a transformer and a T5 text encoder (arXiv 2310.00426, 2403.04692)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..decoder import Decoder, vae_scale_factor
from ..denoiser import Denoiser
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
from .transformer import TransformerCall, transformer_space


class PixArtCall(TransformerCall):
    """Calls PixArt's transformer as `(x, t, cond, **kwargs)`, and drops the variance that it predicts besides."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the predicted noise, (B, C, h, w) like x."""
        return super().__call__(x, t, cond, **kwargs)[:, : x.shape[1]]


class PixArt(Family):
    """PixArt-alpha and PixArt-sigma, with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_embeds and
    prompt_attention_mask, their negative companions, clean_caption, max_sequence_length). Sizes are used as they are:
    the resolution binning of the pipeline, which resizes pictures, is not part of the chain.
    """

    pipelines = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    components = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    guidance_scale = 4.5

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        config, guidance_scale = pipe.transformer.config, self.scale_of(request)
        options = dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        refuse_unknown(options, pipe, encoding_options(pipe))
        is_told = bool(pipe.transformer.use_additional_conditions)
        fixed_by = "this chain's conditions tell the network" if is_told else None
        size = self._size(pipe, request)
        space = transformer_space(pipe, size, config.in_channels, config.patch_size, fixed_by=fixed_by)
        guided = guidance_scale > 1
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        # The default of clean_caption is that of the pipeline's __call__, not of encode_prompt.
        cond, uncond, mask = encode_masked_pair(pipe, request, encoding, guided, clean_caption=True)
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if is_told:
            height, width = size
            told["resolution"] = torch.tensor([[height, width]], device=cond.device, dtype=cond.dtype)
            told["aspect_ratio"] = torch.tensor([[height / width]], device=cond.device, dtype=cond.dtype)
        denoiser = Denoiser(
            PixArtCall(pipe.transformer),
            cond,
            uncond,
            guidance_scale if guided else 1.0,
            encoder_attention_mask=mask,
            added_cond_kwargs=told,
            **own,
        )
        return Parts(denoiser, space.for_prompts(len(cond)), Decoder(pipe.vae))

    def _size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """Returns the height and width of a picture in pixels, and says that other sizes are not binned."""
        own = pipe.transformer.config.sample_size * vae_scale_factor(pipe.vae)
        size = tuple(own if given is None else given for given in (request.height, request.width))
        if size != (own, own):
            warnings.warn(
                f"height, width: {size[0]} x {size[1]} is used as it is; the pipeline's use_resolution_binning, which "
                "may take another size and resize the picture, is not part of the chain",
                RuntimeWarning,
                stacklevel=4,
            )
        return size[0], size[1]
