"""Chains that start from one latent, in contrast to EDICT's pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chain.exact.state import LatticeState
from ..chain.latents import check_latents
from .base import DiffusionChain
from .step_back import step_back


class SingleLatentChain(DiffusionChain):
    """A sampler whose step reads the latents of one step, or of two successive ones.

    Its program has two latents that take turns, and the one that the last coupling changed is the picture. A solver
    that looks back two steps returns the latents of both last steps, because inverting it needs both.

    `optimize` changes the noise alone and scores the picture alone (see `num_starts` and `num_pictures`).
    """

    num_starts = 1
    num_pictures = 1

    @property
    def picture_index(self) -> int:
        """Which of the two values the last coupling changes."""
        return self.program[-1].target if self.program else 0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the sampler.

        Args:
            x: Noise, (B, C, ...).
            y: What `inverse` returned beside the noise. None is zero, which is what a start from noise means.

        Returns:
            The picture's latents, and those of the step before it, which `inverse` needs.
        """
        ends = super().__call__(x, torch.zeros_like(x) if y is None else y)
        return self._picture_first(ends)

    def inverse(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undoes `__call__`.

        Args:
            x: The picture's latents, (B, C, ...).
            y: Those of the step before. None is one DDIM step back from x, with one more network call: a guess for a
                picture that no chain has made.

        Returns:
            The noise, and what the chain must be given beside it to return to exactly these latents: zero, up to
            rounding, if the latents came from a chain that started from noise.
        """
        return super().inverse(*self._picture_first((x, self._before(x) if y is None else y)))

    def state(self, x: Tensor, y: Tensor | None = None, end: str = "noise") -> LatticeState:
        """Rounds latents to a state, see `Chain.state`. They are given as to `__call__` or `inverse`, by `end`."""
        if end != "image":
            return super().state(x, torch.zeros_like(x) if y is None else y, end)
        if y is None:
            with torch.no_grad():
                y = self._before(x)
        return super().state(*self._picture_first((x, y)), end)

    def _before(self, x: Tensor) -> Tensor:
        """The latents before the last step, by a guess."""
        check_latents(x, None)
        return step_back(self.evaluator, self.schedule, x, self.state_dtype)

    def _picture_first(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Exchanges the two latents if the last coupling changes the second one. Doing it twice changes nothing."""
        return (pair[1], pair[0]) if self.picture_index else pair


def check_real(name: str, value: object, low: float, high: float, hint: str) -> float:
    """Returns a number in (low, high] as a float, or raises ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise ValueError(f"{name}: expected a number in ({low:g}, {high:g}], got {value!r}; {hint}")
    return float(value)
