"""`guidance_rescale`: guidance that keeps the deviation of the prompt's prediction (Lin et al., arXiv 2305.08891)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .additions import Addition, Build, numbers
from .base import Request

NAME = "guidance_rescale"


class GuidanceRescale(Addition):
    """The pipeline's `guidance_rescale`, which is not linear in the predictions and is differentiated all the same."""

    options = frozenset({NAME})

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        (self._share,) = numbers(NAME, options.get(NAME, 0.0), 1)
        if not 0 <= self._share <= 1:
            raise ValueError(f"{NAME}: expected a number from 0 to 1, got {self._share:g}")

    @classmethod
    def is_in(cls, pipe: Any) -> bool:
        """Whether the pipeline takes it."""
        return NAME in inspect.signature(type(pipe).__call__).parameters

    def add(self, build: Build) -> None:
        """Gives the `Denoiser` the function that combines the two predictions."""
        if self._share == 0 or not build.guided:
            return
        if build.has_own_guidance:
            raise ValueError(
                f"{NAME}: expected 0 with guidance by three predictions, whose sum is rescaled by a prediction that "
                f"the chain does not keep apart, got {self._share:g}"
            )
        build.kwargs["combine"] = Rescaled(self._share)


class Rescaled:
    """Combines two predictions, and moves the deviation of the result towards that of the prompt's prediction.

    Args:
        share: How far, from 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float, t: Tensor) -> Tensor:
        """Returns the prediction (B, C, h, w).

        Args:
            uncond: Without the prompt.
            cond: With the prompt.
            scale: The guidance scale.
            t: The timestep, which has no part in it.
        """
        found, axes = uncond + scale * (cond - uncond), tuple(range(1, cond.ndim))
        kept = cond.std(axes, keepdim=True) / found.std(axes, keepdim=True)
        return found * (self.share * kept + (1 - self.share))
