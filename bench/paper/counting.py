"""Counts what a method asks of the network, whoever asks: every evaluation, and every vector-Jacobian product (VJP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.optimization.one_step_guidance import OneStepGuidance


@dataclass
class Counter:
    """What was asked of the network since the last reset.

    Attributes:
        forward: Evaluations of the network, with a graph or without. One for each latent and each condition: guidance
            by a pair of conditions counts as two.
        backward: VJPs, one for each evaluation that a cotangent was taken back through.
    """

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Both together: a VJP counts as much as an evaluation."""
        return self.forward + self.backward

    def reset(self) -> None:
        """Starts again from nothing."""
        self.forward = self.backward = 0

    def note(self, output: Tensor) -> None:
        """Counts an evaluation by its output (N, ...), and its VJP if a cotangent ever arrives at it."""
        rows = len(output)
        self.forward += rows
        if output.requires_grad:
            output.register_hook(lambda _cotangent: self._note_backward(rows))

    def _note_backward(self, rows: int) -> None:
        self.backward += rows


class CountingDenoiser(Denoiser):
    """A denoiser that tells a counter of its calls. Its calls can be replayed as CUDA graphs like those of any other.

    When recordings are made and checked the network is called a few times more, which is not counted.

    Args:
        counter: Where calls are counted.
        *args: Those of `Denoiser`.
        **options: Those of `Denoiser`.
    """

    def __init__(self, counter: Counter, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counter = counter

    def raw(
        self,
        x: Tensor,
        t: int | float | Tensor,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, float | None]:
        """See `Denoiser.raw`."""
        output, scale = super().raw(x, t, tensors, latents_dtype)
        self.counter.note(output)
        return output, scale


class CountedGuidance(OneStepGuidance):
    """One-step guidance whose unconditional evaluation, and the VJP of it, are counted too."""

    def gradient(self, x: Tensor, t: Any, latents_dtype: torch.dtype | None = None) -> Tensor:
        """See `OneStepGuidance.gradient`, which evaluates the unconditional network once with its VJP."""
        found = super().gradient(x, t, latents_dtype)
        counter = self.denoiser.counter  # type: ignore[attr-defined]
        counter.forward += len(x)
        counter.backward += len(x)
        return found
