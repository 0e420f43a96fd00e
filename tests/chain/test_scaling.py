"""The gradient of a half-precision network under memory="naive" does not depend on the loss's scale."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, TinyNet, latents, relative, tiny_chain
from torch import nn

HALF = [torch.float16, torch.bfloat16]


def gradient(chain, x, scale=1.0):
    return torch.autograd.grad(sum(out.double().square().sum() for out in chain(x)) * scale, x)[0].double() / scale


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-20, 2.0**20, 2.0**40])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("memory", ["naive", "checkpoint"])
def test_the_scale_of_the_loss_does_not_matter(memory, dtype, scale):
    chain = tiny_chain(5, memory, network=TinyNet().to(dtype), dtype=dtype)
    x, _ = latents(1, 3, 4, 4, dtype=torch.float32, grad=True)
    assert relative(gradient(chain, x, scale), gradient(chain, x)) < 1e-6


@pytest.mark.parametrize("dtype", HALF)
def test_conditions_are_scaled_back(dtype):
    chain = tiny_chain(4, "naive", network=TinyNet().to(dtype), dtype=dtype)
    cond = chain.denoiser.cond.requires_grad_()
    x, _ = latents(1, 3, 4, dtype=torch.float32)
    expected = torch.autograd.grad(chain(x)[0].sum(), cond)[0]
    chain.memory = "checkpoint"
    assert relative(expected, torch.autograd.grad(chain(x)[0].sum(), cond)[0]) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_tensors_that_the_network_closes_over_have_their_own_gradients(scale):
    """A plain function's weights are unknown to the chain, and must not be scaled with what it knows."""
    weight = nn.Parameter(torch.full((), 0.5, dtype=torch.float16, device=DEVICE))
    outer = (weight * 2).half()
    x, _ = latents(1, 3, 4, dtype=torch.float16, grad=True)
    both = {}
    for dtype in (torch.float16, torch.float64):
        chain = tiny_chain(2, "naive", network=lambda z, t, c: torch.tanh(z * outer.to(z.dtype)), guidance_scale=1.0)
        out = chain(x.to(dtype))[0].double().sum() * scale
        both[dtype] = torch.autograd.grad(out, [x, weight], retain_graph=True)
    for got, want in zip(both[torch.float16], both[torch.float64], strict=True):
        assert relative(got.double(), want.double()) < 1e-2


def test_second_derivatives_of_an_fp16_network():
    x, v = latents(1, 3, 2, dtype=torch.float32)
    found = []
    for dtype in (torch.float16, torch.float64):
        chain = tiny_chain(3, "naive", network=TinyNet().to(dtype), dtype=dtype)
        loss = lambda z, chain=chain: chain(z)[0].pow(3).sum()  # noqa: E731
        found.append(torch.autograd.functional.hvp(loss, x, v)[1])
    assert relative(*found) < 2e-2


def test_batched_gradients_of_an_fp16_network():
    chain = tiny_chain(3, "naive", network=TinyNet().half(), dtype=torch.float16)
    x, v = latents(1, 3, 2, dtype=torch.float32)
    x.requires_grad_()
    out = chain(x)[0]
    many = torch.autograd.grad(out, x, torch.stack([v, -v]), is_grads_batched=True, retain_graph=True)[0]
    assert relative(many[0], torch.autograd.grad(out, x, v)[0]) < 1e-2 and relative(many[1], -many[0]) < 1e-2
