"""The CUDA and Triton kernels on a GPU are compared with the eager kernels on the CPU; without a GPU, skipped.

`DOODL_FAST_REHEARSE=1` runs them without one: the kernels for the CPU and Triton's interpreter take the GPU's place, so
that a mistake in the tests themselves is found before there is a GPU.
"""

from __future__ import annotations

import os

import pytest
import test_lattice_ops as lattice
import torch
from conftest import DTYPES
from ops_cases import STATE_EPS, operands, same_bits
from test_ops import MIXINGS, A, B, C, G, update

from doodl_fast import ops

GPU = torch.cuda.is_available()
CARD = torch.device("cuda" if GPU else "cpu")
pytestmark = pytest.mark.skipif(
    not GPU and not os.environ.get("DOODL_FAST_REHEARSE"), reason="torch sees no CUDA device"
)
needs_gpu = pytest.mark.skipif(not GPU, reason="torch sees no CUDA device")


@pytest.fixture(params=["native", "triton"])
def backend(request):
    reason = ops.why_not(request.param, CARD.type)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def results(target, source, eps, g):
    scale = torch.tensor(0.25, dtype=target.dtype, device=target.device)
    found = [ops.coupling(target, source, eps, A, C, B, g), ops.coupling(target, None, eps, A, 0.0, B, g)]
    found += ops.coupling_vjp(target, A, C, B, g, scale, eps.dtype, want_source=True)
    for mixing in MIXINGS:
        found += ops.coupling_mix(target, source, eps, mixing, A, C, B, g)
        found += ops.coupling_mix_vjp(target, source, mixing, A, C, B, g, scale, eps.dtype)
    return found


def agree(backend, tensors, g) -> None:
    with ops.backend("eager"):
        want = results(*(z.cpu() for z in tensors), g)
    with ops.backend(backend):
        got = results(*(z.to(CARD) for z in tensors), g)
    assert all(same_bits(a.cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("state", "eps"), STATE_EPS)
def test_small_sizes_agree_to_the_last_bit(backend, state, eps, guided):
    for shape in ((1, 1), (2, 3, 5, 7), (1, 4, 16, 16)):
        agree(backend, operands(shape, state, eps, guided), G if guided else None)


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("eps", DTYPES)
@pytest.mark.parametrize("integer", lattice.INTEGERS)
def test_lattice_couplings_agree_to_the_last_bit(backend, integer, eps, guided, undo):
    tensors = lattice.operands((1, 4, 33, 65), integer, eps, guided)
    numbers = (lattice.C, lattice.B[integer], G if guided else None, undo)
    results = []
    for name, device in (("eager", "cpu"), (backend, CARD)):
        *four, network = (z.to(device) for z in tensors)
        network[0, 0, 0, 0] = float("inf")  # This fault is noted on the device.
        table = lattice.faults().to(device)
        with ops.backend(name):
            found = [ops.lattice_coupling(four[0], four[1], network, table, 0, *numbers)]
            for mixing in lattice.MIXINGS:
                found += ops.lattice_mix(*four, network, table, 1, mixing, *numbers)
                found += ops.lattice_mix(*four, None, table, 2, mixing, undo=undo)
        results.append([z.cpu() for z in (*found, table)])
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))
    assert results[0][-1].tolist() == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_small_latent_update(backend, dtype):
    x, y, noise = (z.cpu() for z in operands((2, 4, 9, 11), dtype, dtype, False))
    starts = [torch.ones(2), torch.ones(2)]
    with ops.backend("eager"):
        want = update(x, y, noise, starts)
    generator = torch.Generator().manual_seed(5)
    gx, gy, mx, my = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for _ in range(4))
    options = {"rate": 0.5, "clip": 0.4, "momentum": 0.9, "tied": True, "sigma": 0.1}
    with ops.backend(backend):
        pairs = ops.latent_update(
            *[(a.to(CARD), b.to(CARD)) for a, b in ((x, y), (mx, my), (gx, gy))],
            noise.to(CARD),
            [s.to(CARD) for s in starts],
            **options,
        )
    for got, expected in zip([*pairs[0], *pairs[1]], want, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=2e-15 if dtype == "fp64" else 1.3e-7, atol=0)


def test_unaligned_memory(backend):
    tensors = [z.to(CARD) for z in operands((1, 1025), "fp32", "fp32", False)]
    shifted = [z.flatten()[1:].reshape(1, 1024) for z in tensors]
    with ops.backend(backend):
        got = ops.coupling(*shifted, A, C, B)
    with ops.backend("eager"):
        assert same_bits(got.cpu(), ops.coupling(*(z.cpu() for z in shifted), A, C, B))


@needs_gpu
def test_more_than_2_to_the_31_elements(backend):
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    target = torch.zeros(1, 2**31 + 2048, dtype=torch.float16, device="cuda")
    target[0, -3:] = 2.0
    with ops.backend(backend):
        out = ops.coupling(target, target, None, 0.5, 1.0)
    assert out[0, -3:].tolist() == [3.0] * 3 and not out[0, :-3].any()


@needs_gpu
def test_runs_on_the_current_stream(backend):
    x = torch.ones(1, 2**20, device="cuda")
    stream = torch.cuda.Stream()
    with ops.backend(backend), torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        out = ops.coupling(x.mul_(2), None, None, 3.0)
    stream.synchronize()
    assert (out == 6).all()
