"""The gradient of a loss with respect to final latents, without what float16 would round to zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cotangent_of(value: Tensor, leaf: Tensor, pixels: int) -> Tensor | None:
    """d value / d leaf, in float32 or float64; None if the loss does not depend on the latents.

    In float16 the gradient of a mean over pixels lies among the subnormal numbers or vanishes. So for float16 leaves
    the loss is multiplied by a power of two, which is exact, and the gradient divided by it in float32, as loss scaling
    does in mixed-precision training. The first power follows from the number of pixels alone, and not from earlier
    steps, so that a resumed run computes the same bits.

    Args:
        value: The loss, a 0-dim tensor.
        leaf: The latents of the decoder.
        pixels: Number of elements of the image.
    """
    if leaf.dtype != torch.float16:
        (cotangent,) = torch.autograd.grad(value, leaf, allow_unused=True)
        return None if cotangent is None else wide(cotangent)
    highest = 15 if value.dtype == torch.float16 else 100  # the scale itself has to fit into the dtype of the loss
    exponent = min(pixels.bit_length(), highest)
    for _ in range(6):
        scale = torch.full_like(value, 2.0**exponent)
        (cotangent,) = torch.autograd.grad(value, leaf, scale, retain_graph=True, allow_unused=True)
        if cotangent is None:
            return None
        largest = float(cotangent.abs().amax())
        better = max(-highest, min(highest, exponent + _exponent_change(largest)))
        if better == exponent:
            break
        exponent = better
    return cotangent.float() * 2.0**-exponent


def _exponent_change(largest: float) -> int:
    """By how much to raise the exponent of the loss scale, for the largest magnitude of a float16 gradient."""
    if largest == 0:
        return 20
    if not math.isfinite(largest):
        return -20
    exponent = math.frexp(largest)[1]
    return 0 if 3 <= exponent <= 14 else 10 - exponent
