"""The count of what kinds of operators read and write, against closed forms for single layers."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    return importlib.import_module("op_shares")


def by_kind(found):
    sums = {}
    for kernel in found:
        sums[kernel.kind] = sums.get(kernel.kind, 0) + kernel.bytes
    return sums


def counted(bench, make, shape, *args):
    """The kernels of a layer in float32 on the meta device."""
    with torch.device("meta"):
        net = make().eval().requires_grad_(False)
        x, given = torch.empty(shape), [torch.empty(size) for size in args]
    return bench.kernels((net, x, lambda net, x: net(x, *given)))


def test_a_residual_block(bench):
    from diffusers.models.resnet import ResnetBlock2D

    n, c, side = 2, 64, 32
    found = counted(bench, lambda: ResnetBlock2D(in_channels=c, temb_channels=8), (n, c, side, side), (n, 8))
    passes = n * c * side * side * 4  # one read or one write of all activations
    sums = by_kind(found)
    # Two norms read 1 and write 1, and 2 and 1 in the VJP; so do two activations. Statistics and weights come on top.
    assert sums[bench.GROUP] == pytest.approx(2 * (2 + 3 + 2 + 3) * passes, rel=0.01)
    assert sums[bench.EMBED] == pytest.approx(2 * passes, rel=0.01)
    assert sums[bench.GATE] == pytest.approx((3 + 2 + 2) * passes, rel=0.01)  # x + h, and a division by 1 with its VJP
    assert sums[bench.SUM] == pytest.approx(3 * passes, rel=0.01)
    products = sum(kernel.flops for kernel in found)
    assert products == 2 * 2 * 2 * n * side * side * c * c * 9 + 2 * n * 8 * c  # two convolutions and their VJPs


def test_a_modulated_norm_and_what_one_kernel_would_move(bench):
    from diffusers.models.normalization import AdaLayerNormContinuous

    n, tokens, c = 2, 1024, 64
    found = counted(bench, lambda: AdaLayerNormContinuous(c, 8, elementwise_affine=False), (n, tokens, c), (n, 8))
    passes = n * tokens * c * 4
    # The norm: 2, and 3 in the VJP. The product: 2 and 2. The sum: 2, and nothing.
    assert by_kind(found)[bench.NORM] == pytest.approx((2 + 3 + 2 + 2 + 2) * passes, rel=0.06)
    one = bench.fused(found, (bench.NORM,))
    assert len(one) == 2 and sum(kernel.bytes for kernel in one) == pytest.approx((2 + 3) * passes, rel=0.06)


def test_shares_and_the_time_on_a_cpu(bench, capsys):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)
        x = torch.empty(512, 64)
    _, rows = bench.bounds((net, x, lambda net, x: net(x)), 1e30, 1e12)  # Only bytes take time.
    shares = {row.split(" | ")[0]: row.split(" | ")[2:4] for row in rows}
    assert shares[bench.GATED][0] == shares[bench.GATED][1]  # So a share of time is one of bytes.
    net, x = net.to_empty(device="cpu"), torch.zeros(512, 64)
    head, rows = bench.measured((net, x, lambda net, x: net(x)), 2)
    assert head.endswith(" s") and [row.split(" | ")[0] for row in rows[:2]] == [bench.PRODUCT, bench.GATED]
