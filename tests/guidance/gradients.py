"""What the tests of rewards share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import randn
from torch import Tensor


def check_gradient(loss: Callable[[Tensor], Tensor], images: Tensor, least: float = 1e-5, rel: float = 1e-5) -> None:
    """Compares a gradient in float64 with central differences in three random directions.

    Args:
        loss: The loss, of a float64 network.
        images: Pictures, whose values stay within (-1, 1).
        least: The norm that the gradient has at least.
        rel: The relative error that is allowed.
    """
    leaf = images.double().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    assert float(grad.norm()) > least
    for seed in range(3):
        direction = randn(*images.shape, seed=seed)
        direction, step = direction / direction.norm(), 1e-5
        with torch.no_grad():
            slope = float(loss(leaf + step * direction) - loss(leaf - step * direction)) / (2 * step)
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=rel, abs=1e-7 * float(grad.norm()))
