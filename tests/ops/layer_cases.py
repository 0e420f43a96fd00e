"""What the tests of the ops for layers share: operands, and how far results are from float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import DEVICE
from torch import Tensor

EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}

ROUNDED_ONCE = 0.5
"""A result that is computed in a wider dtype and rounded once is off by at most half a unit in the last place of its
own, so in the 2-norm by less than half of the dtype's epsilon. The sums of float32 add to that in float32 alone."""


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, mean: float = 0.0) -> Tensor:
    """Returns normal numbers around a mean."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (value + mean).to(DEVICE, dtype)


def distance(got: Tensor, want: Tensor) -> float:
    """Returns |got - want| / |want| in the 2-norm, computed in float64."""
    assert got.shape == want.shape
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm())


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the result of a function, and by autograd the gradient of its input."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def exact(function: Callable[..., Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `with_gradient` does in float64, on contiguous tensors."""
    return with_gradient(function, x.double().contiguous(), grad.double().contiguous())


def bound(dtype: torch.dtype, condition: float = 1.0) -> float:
    """Returns the largest distance from float64 that an op may have.

    condition: How many units in the last place the sums and the subtraction of the mean may cost, beside the rounding.
    """
    sums = EPSILON[torch.float64 if dtype == torch.float64 else torch.float32]
    return ROUNDED_ONCE * EPSILON[dtype] + condition * sums
