"""PixArt-alpha and PixArt-sigma: diffusion with a transformer and a T5 text encoder (arXiv 2310.00426, 2403.04692)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..decoder import vae_scale_factor
from ..hooks import device_of
from .base import Request
from .masked import MaskedFamily, warn_unbinned
from .transformer import TransformerCall


class PixArtCall(TransformerCall):
    """Calls PixArt's transformer as `(x, t, cond, **kwargs)`, and drops the variance that it predicts besides."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the predicted noise, (B, C, h, w) like x."""
        return super().__call__(x, t, cond, **kwargs)[:, : x.shape[1]]


class PixArt(MaskedFamily):
    """PixArt-alpha and PixArt-sigma, with classifier-free guidance in one batch.

    It takes `clean_caption` besides. Sizes are used as they are: the resolution binning of the pipeline, which resizes
    pictures, is not part of the chain.
    """

    pipelines = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    guidance_scale = 4.5
    network_options = frozenset()
    own_options = frozenset()

    def network(self, pipe: Any) -> PixArtCall:
        """See `MaskedFamily.network`."""
        return PixArtCall(pipe.transformer)

    def conditions(self, pipe: Any, request: Request, size: tuple[int, int], encoded: Any) -> dict[str, Any]:
        """See `MaskedFamily.conditions`."""
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if pipe.transformer.use_additional_conditions:
            height, width = size
            like = {"device": device_of(pipe.transformer), "dtype": pipe.transformer.dtype}
            told["resolution"] = torch.tensor([[height, width]], **like)
            told["aspect_ratio"] = torch.tensor([[height / width]], **like)
        return {**super().conditions(pipe, request, size, encoded), "added_cond_kwargs": told}

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """See `MaskedFamily.size`; it says that other sizes than the pipeline's own are not binned."""
        size = super().size(pipe, request)
        warn_unbinned(pipe, request, size, pipe.transformer.config.sample_size * vae_scale_factor(pipe.vae))
        return size

    def fixed_by(self, pipe: Any) -> str | None:
        """See `MaskedFamily.fixed_by`."""
        return "this chain's conditions tell the network" if pipe.transformer.use_additional_conditions else None
