"""Whether the network returns the same value in the backward pass as in the forward run, from a few numbers a call.

The numbers are the dot products of the network's output with fixed vectors of random signs. For a difference d of two
outputs they differ by |d| on average (Alon, Matias and Szegedy, "The space complexity of approximating the frequency
moments", 1999), whereas the norms of the outputs differ by far less.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By the dtype that the network computes in: the relative difference that the rounding of other kernels may make, those
of a compiled network with a graph and without for instance."""
COUNT = 4
"""How many numbers an output has: the estimate is right within a factor of 2, nearly always."""
WIDER_VJP = 4
"""The tolerance is multiplied by this where VJPs are taken in a wider dtype, so that the values differ by rounding."""


class Fingerprints:
    """Makes a few numbers of each output of a network, and compares those of two outputs; all on their device.

    Args:
        dtype: The dtype of the numbers, float32 or float64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._signs: dict[tuple[int, torch.device], Tensor] = {}
        self._squares: list[Tensor] = []

    def of(self, value: Tensor) -> Tensor:
        """The numbers of an output of any shape and dtype, as a tensor of shape (COUNT,)."""
        key = (value.numel(), value.device)
        if key not in self._signs:
            self._signs[key] = _signs(value.numel(), value.device).to(self._dtype)
        return (self._signs[key] * value.detach().to(self._dtype).reshape(-1)).sum(1)

    def compare(self, numbers: Tensor, value: Tensor) -> None:
        """Notes how far an output is from the one that has `numbers`."""
        size = value.detach().to(self._dtype).square().sum()
        self._squares.append(torch.stack([(self.of(value) - numbers).square().mean(), size]))

    def mismatch(self) -> Tensor | None:
        """|difference| / |output| over all comparisons together, as a 0-dim tensor; None if there were none.

        It is an estimate, but for 0, which it is if all outputs were equal.
        """
        if not self._squares:
            return None
        difference, size = torch.stack(self._squares).sum(0)
        return (difference / size.clamp_min(torch.finfo(self._dtype).tiny)).sqrt()


def _signs(size: int, device: torch.device) -> Tensor:
    """COUNT rows of pseudo-random values of 1 and -1: bits of hashed indices, so that no generator is touched."""
    bits = torch.arange(1, COUNT * size + 1, device=device) * 0x9E3779B1
    bits = (bits ^ (bits >> 15)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return (((bits >> 16) & 1) * 2 - 1).reshape(COUNT, size)


def tolerance(network_dtype: torch.dtype, wider_vjp: bool) -> float:
    """The largest mismatch that rounding explains."""
    return TOLERANCES.get(network_dtype, TOLERANCES[torch.float32]) * (WIDER_VJP if wider_vjp else 1)
