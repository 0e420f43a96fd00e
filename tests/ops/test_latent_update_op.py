"""The latent update on every backend is compared with torch's own optimiser and with the eager kernel."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import DEVICE
from ops_cases import LAYOUTS, operands, same_bits, update

from doodl_fast import ops

UPDATES = [
    {"nesterov": nesterov, "tied": tied, "clip": clip}
    for nesterov, tied, clip in itertools.product([False, True], [False, True], [None, 0.4])
]


@pytest.mark.parametrize("settings", UPDATES, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_latent_update_against_torch(backend, dtype, settings):
    """Returns the update by torch's own SGD and clamp, in float64."""
    x, y, _ = operands((2, 4, 9, 11), dtype, dtype, False)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(x)
    starts = list(torch.tensor([[3.0, 5.0], [2.0, 7.0]], device=DEVICE))
    got = update(x, y, noise, starts, **settings)
    generator = torch.Generator().manual_seed(5)
    gx, gy, mx, my = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x).double() for _ in range(4))
    grads = [gx / 2, gy / 2]
    if settings["tied"]:
        grads = [(grads[0] + grads[1]) / 2] * 2
    if settings["clip"]:
        grads = [torch.clamp(grad, -0.4, 0.4) for grad in grads]
    ends, momenta = [], []
    for z, momentum, grad in ((x, mx, grads[0]), (y, my, grads[1])):
        parameter = z.double().requires_grad_()
        parameter.grad = grad.clone()  # SGD may change it, and both latents may have the same one.
        optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9, nesterov=settings["nesterov"])
        optimizer.state[parameter]["momentum_buffer"] = momentum.clone()
        optimizer.step()
        ends.append(parameter.detach() + 0.1 * noise.double())
        momenta.append(optimizer.state[parameter]["momentum_buffer"])
    if settings["tied"]:
        ends = [(ends[0] + ends[1]) / 2] * 2
    ends = [
        z * (start.double() / z.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
        for z, start in zip(ends, starts, strict=True)
    ]
    tolerance = {"fp32": 3e-6, "fp64": 1e-14}[dtype]
    for result, want in zip(got, [*ends, *momenta], strict=True):
        assert result.dtype == x.dtype
        torch.testing.assert_close(result.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1031), (2,), (0, 4), (2, 0)], ids=str)
def test_latent_update_agrees(backend, shape, dtype):
    """Without start norms the backends agree bit for bit, with them up to the order of a float64 sum."""
    x, y, noise = operands(shape, dtype, dtype, False)
    starts = list(torch.rand(2, shape[0], device=DEVICE) + 1)
    for options in UPDATES:
        got, scaled = update(x, y, noise, **options), update(x, y, noise, starts, **options)
        with ops.backend("eager"):
            want, want_scaled = update(x, y, noise, **options), update(x, y, noise, starts, **options)
        assert all(same_bits(g, w) for g, w in zip(got, want, strict=True))
        for g, w in zip(scaled, want_scaled, strict=True):
            torch.testing.assert_close(g, w, rtol=2e-15 if dtype == "fp64" else 1.3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latent_update_layouts(backend, layout):
    x, y, noise = operands((2, 4, 5, 6), "fp32", "fp32", False)
    starts = list(torch.ones(2, 2, device=DEVICE))
    want = update(x, y, noise, starts)
    got = update(*(LAYOUTS[layout](z) for z in (x, y, noise)), starts)
    assert all(torch.allclose(g, w, rtol=2e-7, atol=0) for g, w in zip(got, want, strict=True))


def test_latent_update_keeps_nan(backend):
    x = torch.tensor([[1.0, math.nan, 2.0]], device=DEVICE)
    assert torch.isnan(update(x, x.clone())[0]).tolist() == [[False, True, False]]
