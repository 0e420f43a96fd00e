"""Whether the network returns the same value in the backward pass as in the forward run, from a few numbers a call.

The elements of the network's output are given fixed random signs, and are added up in up to COUNT groups. The sums of
two outputs that differ by d are, on average, |d| apart in the 2-norm (Charikar, Chen and Farach-Colton, "Finding
frequent items in data streams", 2002), whereas the norms of the outputs differ by far less.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNT = 64
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By the dtype that the network computes in: the relative difference that the rounding of other kernels may make, those
of a compiled network with a graph and without for instance."""
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
        """The sums of an output of any shape and dtype, as a tensor of one dimension."""
        key = (value.numel(), value.device)
        if key not in self._signs:
            self._signs[key] = _signs(*key)
        signs = self._signs[key]
        return (signs * value.detach().reshape(signs.shape).to(self._dtype)).sum(1)

    def compare(self, numbers: Tensor, value: Tensor) -> None:
        """Notes how far an output is from the one that has `numbers`."""
        size = torch.linalg.vector_norm(value.detach().to(self._dtype))
        self._squares.append(torch.stack([torch.linalg.vector_norm(self.of(value) - numbers), size]).square())

    def mismatch(self) -> Tensor | None:
        """|difference| / |output| over all comparisons together, as a 0-dim tensor; None if there were none.

        It is an estimate, but for 0, which it is if all outputs were equal.
        """
        if not self._squares:
            return None
        difference, size = torch.stack(self._squares).sum(0)
        return (difference / size.clamp_min(torch.finfo(self._dtype).tiny)).sqrt()


def _signs(size: int, device: torch.device) -> Tensor:
    """`size` pseudo-random values of 1 and -1 in equal rows, as int8. They are hashed indices: no generator is used."""
    rows = next(rows for rows in range(min(COUNT, max(size, 1)), 0, -1) if size % rows == 0)
    bits = torch.arange(1, size + 1, device=device)
    for shift, factor in ((16, 0x9E3779B1), (15, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)).mul_(factor)
    return ((bits >> 16) & 1).to(torch.int8).mul_(2).sub_(1).reshape(rows, size // rows)


def tolerance(network_dtype: torch.dtype, wider_vjp: bool) -> float:
    """The largest mismatch that rounding explains."""
    return TOLERANCES.get(network_dtype, TOLERANCES[torch.float32]) * (WIDER_VJP if wider_vjp else 1)
