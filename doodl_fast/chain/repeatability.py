"""Whether the network returns the same value in the backward pass as in the forward run, from one number a call.

Each number is the dot product of the network's output with a fixed vector of random signs. For a difference d of two
outputs that product has the magnitude |d| (up to a random factor near 1, over many calls: Alon, Matias and Szegedy,
"The space complexity of approximating the frequency moments", 1999), whereas norms of the outputs differ by far less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By the dtype that the network computes in: the relative difference that the rounding of other kernels may make, those
of a compiled network with a graph and without for instance."""
WIDER_VJP = 4
"""The tolerance is multiplied by this where VJPs are taken in a wider dtype, so that the values differ by rounding."""


class Fingerprints:
    """Makes one number of each output of a network, on its device.

    Args:
        dtype: The dtype of the numbers, float32 or float64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._signs: dict[tuple[int, torch.device], Tensor] = {}

    def of(self, value: Tensor) -> Tensor:
        """The number of an output of any shape and dtype, as a 0-dim tensor."""
        key = (value.numel(), value.device)
        if key not in self._signs:
            self._signs[key] = _signs(value.numel(), value.device).to(self._dtype)
        return torch.dot(self._signs[key], value.detach().to(self._dtype).reshape(-1))


def _signs(count: int, device: torch.device) -> Tensor:
    """`count` pseudo-random values of 1 and -1: bits of the hashed indices, so that no generator is touched."""
    bits = torch.arange(1, count + 1, device=device) * 0x9E3779B1
    bits = (bits ^ (bits >> 15)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return ((bits >> 16) & 1) * 2 - 1


def mismatch(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """|second - first| / |first| of all outputs together, estimated from their numbers; 0-dim, 0 if all are equal."""
    first, second = (torch.stack(numbers) for numbers in zip(*pairs, strict=True))
    size = torch.linalg.vector_norm(first).clamp_min(torch.finfo(first.dtype).tiny)
    return torch.linalg.vector_norm(second - first) / size


def tolerance(network_dtype: torch.dtype, wider_vjp: bool) -> float:
    """The largest mismatch that rounding explains."""
    return TOLERANCES.get(network_dtype, TOLERANCES[torch.float32]) * (WIDER_VJP if wider_vjp else 1)
