"""Guidance that is not linear in the two predictions, as functions for `Denoiser(..., combine=...)`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RescaledGuidance:
    """Classifier-free guidance with a part of its deviation taken back (arXiv 2305.08891, section 3.4).

    Attributes:
        rescale: diffusers' `guidance_rescale`: 1 gives the guided prediction of each picture the standard deviation of
            the prediction for the prompt, 0 leaves it as it is.

    Example:
        >>> denoiser = Denoiser(unet, cond, uncond, 7.5, combine=RescaledGuidance(0.7))
    """

    rescale: float

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float, t: Tensor) -> Tensor:
        """Combines predictions (B, C, ...)."""
        guided = uncond + scale * (cond - uncond)
        dims = tuple(range(1, cond.ndim))
        rescaled = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        return self.rescale * rescaled + (1 - self.rescale) * guided
