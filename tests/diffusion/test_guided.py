"""Pairs of conditions reach their halves of a guided evaluation for a batch of any size."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, randn, relative
from tolerances import FP64
from torch import Tensor

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.guided import Guided, join_pairs, unconditional


def shifted(x: Tensor, t: Tensor, cond: Tensor, extra: Any) -> Tensor:
    return TinyNet().double()(x, t, cond, extra["shift"])


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, None])
def test_each_half_gets_its_own(batch: int, rows: int | None) -> None:
    x = randn(batch, 3, 4, 4).to(DEVICE)
    cond, uncond = conditions()
    shifts = randn(2, rows or batch, seed=1).to(DEVICE)
    pair = Guided(shifts[0], shifts[1])
    plain = [
        Denoiser(shifted, states, extra={"shift": shift.expand(batch)})(x, 500)
        for states, shift in ((uncond, pair.uncond), (cond, pair.cond))
    ]
    guided = Denoiser(shifted, cond, uncond, 3.0, extra={"shift": pair})
    assert relative(plain[0], plain[1]) > 1e-2
    assert relative(guided(x, 500), plain[0] + 3 * (plain[1] - plain[0])) < FP64
    assert relative(Denoiser(shifted, cond, extra={"shift": pair})(x, 500), plain[1]) < FP64
    assert len(guided.tensors()) == 4


def test_both_halves_get_gradients() -> None:
    cond, uncond = conditions()
    pair = Guided(
        *(torch.full((1,), value, dtype=torch.float64, device=DEVICE, requires_grad=True) for value in (0.0, 1.0))
    )
    guided = Denoiser(shifted, cond, uncond, 3.0, extra={"shift": pair})
    x = randn(2, 3, 4, 4).to(DEVICE)
    gradients = torch.autograd.grad(guided(x, 500).sum(), list(pair))
    assert all(gradient.abs() > 0 for gradient in gradients) and gradients[0] * gradients[1] < 0


def test_a_half_that_does_not_fit_is_named() -> None:
    cond, uncond = conditions()
    guided = Denoiser(shifted, cond, uncond, 3.0, extra={"shift": Guided(torch.zeros(2), torch.zeros(1))})
    with pytest.raises(ValueError, match=r"extra\['shift'\].uncond: expected a leading dimension of 1 or 3"):
        guided(torch.randn(3, 3, 4, 4, device=DEVICE), 500)


def test_pairs_are_found_at_any_depth() -> None:
    Point = namedtuple("Point", "left right")
    pair = Guided(torch.zeros(1), torch.ones(1))
    tree = {"a": [pair, (pair, 3)], "b": Point(pair, None)}
    expand: Any = lambda leaf, name: leaf  # noqa: E731
    both = join_pairs(tree, True, expand)
    assert both["a"][0].tolist() == both["b"].left.tolist() == [0, 1] and both["a"][1][1] == 3
    assert join_pairs(tree, False, expand)["a"][1][0].tolist() == [1]
    alone = unconditional(tree)
    assert alone["a"][0].tolist() == alone["b"].left.tolist() == [0] and isinstance(alone["b"], Point)
