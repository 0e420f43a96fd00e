"""Dtypes, the precision of the state, the range of half-precision networks, and autocast."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, DTYPES, MEMORIES, TinyNet, conditions, latents, pull, relative, tiny_chain

from doodl_fast.chain.arithmetic import power_of_two
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.solvers.edict import EDICT

ALL = [*MEMORIES, "naive"]


# Dtypes


@pytest.mark.parametrize("memory", ALL)
@pytest.mark.parametrize("network", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_gradients_have_the_inputs_dtype(dtype, network, memory):
    chain = tiny_chain(3, memory, dtype=DTYPES[network])
    x, y = latents(2, 3, 4, dtype=DTYPES[dtype], grad=True)
    out = chain(x, y)
    grads = pull(out, [x, y])
    assert {t.dtype for t in (*out, *grads)} == {DTYPES[dtype]}
    truth = tiny_chain(3, "naive")
    xs, ys = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    # rebuilding three steps divides every rounding by p six times; the others need 4
    bound = 8 * max(torch.finfo(DTYPES[dtype]).eps, torch.finfo(DTYPES[network]).eps)
    for got, want in zip((*out, *grads), (*truth(xs, ys), *pull(truth(xs, ys), [xs, ys])), strict=True):
        assert relative(got, want) < bound


def test_plain_callables_compute_in_the_latents_dtype():
    seen = set()

    def network(x, t, cond):
        seen.add((x.dtype, cond.dtype))
        return x * 0.5

    chain = tiny_chain(3, network=network)
    x, y = latents(1, 3, 4, dtype=torch.bfloat16, grad=True)
    pull(chain(x, y), [x, y])
    assert seen == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.float64])
def test_state_dtype(state_dtype):
    seen = set()

    class Spy(Denoiser):
        def __call__(self, x, *args):
            seen.add(x.dtype)
            return super().__call__(x, *args)

    denoiser = Spy(TinyNet().double(), None)
    for latents_dtype in (torch.float16, torch.float64):
        seen.clear()
        x, y = latents(1, 3, 4, dtype=latents_dtype, grad=True)
        pull(EDICT(denoiser, tiny_chain(3).schedule, state_dtype=state_dtype)(x, y), [x, y])
        narrow = state_dtype == torch.float32 and latents_dtype == torch.float16
        assert seen == {torch.float32 if narrow else torch.float64}  # never below the latents' own precision


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_state_in_fp64_undoes_half_precision_networks(dtype):
    """The fp64 state makes a rebuilt point round to the very bits that the network saw."""
    chain = tiny_chain(50, dtype=DTYPES[dtype], network=TinyNet().to(DTYPES[dtype]))
    x, y = latents(1, 3, 4, 4, dtype=torch.float32, grad=True)
    exact = pull(chain(x, y), [x, y])
    chain.memory = "reversible"
    for got, want in zip(pull(chain(x, y), [x, y]), exact, strict=True):
        assert relative(got, want) < 1e-4


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
def test_any_loss_scale_with_an_fp16_network(scale, memory):
    """Cotangents far outside fp16's range: the gradient scales with the loss.

    A factor that is no power of two changes what is rounded to fp16 in a call, by at most two of its epsilons in all.
    """
    chain = tiny_chain(10, memory, dtype=torch.float16)
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    power = 2.0 ** round(math.log2(scale))
    expected = torch.autograd.grad(chain(x, y)[0].sum(), [x, y])
    scaled = torch.autograd.grad(chain(x, y)[0].sum() * scale, [x, y])
    exact = torch.autograd.grad(chain(x, y)[0].sum() * power, [x, y])
    for got, same, want in zip(scaled, exact, expected, strict=True):
        assert want.abs().min() > 0 and torch.equal(same / power, want)
        assert relative(got.double() / scale, want) < 2 * torch.finfo(torch.float16).eps


def test_scaling_reaches_the_conditions_gradient():
    cond, uncond = conditions(dtype=torch.float32)
    cond.requires_grad_()
    chain = EDICT(Denoiser(TinyNet().half(), cond, uncond, 2.0, vjp_dtype=None), tiny_chain(4).schedule)
    x, _ = latents(1, 3, 4, dtype=torch.float32)
    expected = torch.autograd.grad(chain(x)[0].sum(), cond)[0]
    scaled = torch.autograd.grad(chain(x)[0].sum() * 2.0**-60, cond)[0]
    assert torch.equal(scaled * 2.0**60, expected) and expected.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two(dtype):
    for value, power in [(1.0, 1.0), (1.999, 1.0), (-6.5, 4.0), (3e-30, 2.0**-99), (2.0**100, 2.0**100)]:
        assert power_of_two(torch.tensor([[0.0, value]], dtype=dtype, device=DEVICE)).item() == power
    for value in (0.0, float("inf"), float("nan"), 1e-320):
        assert power_of_two(torch.tensor([value], dtype=dtype, device=DEVICE)).item() == 1.0
    assert power_of_two(torch.empty(0, 3, dtype=dtype, device=DEVICE)).item() == 1.0


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_zero_and_non_finite_cotangents_pass(value):
    chain = tiny_chain(3, dtype=torch.float16)
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    grads = torch.autograd.grad([o.sum() * value for o in chain(x, y)], [x, y])
    for grad in grads:
        assert (grad == 0).all() if value == 0 else not grad.isfinite().any()


# Autocast


@pytest.mark.parametrize("memory", MEMORIES)
def test_callers_autocast_holds_in_the_backward_pass(memory):
    """A backward pass outside the caller's autocast evaluates under it, as plain autograd's graph does."""
    seen: list[torch.dtype] = []

    class Spy(TinyNet):
        def forward(self, x, t, cond=None):
            seen.append((self.inside @ self.inside.T).dtype)
            return super().forward(x, t, cond)

    net = Spy()
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    results = {}
    for mode in ("naive", memory):
        chain = tiny_chain(4, mode, dtype=torch.float32, network=net)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            outputs = chain(x, y)
        seen.clear()
        results[mode] = pull(outputs, [x, y])
        assert set(seen) <= {torch.bfloat16} and bool(seen) == (mode != "naive")
    for got, want in zip(results[memory], results["naive"], strict=True):
        assert relative(got, want) < 2e-2
    full = pull(tiny_chain(4, memory, dtype=torch.float32, network=net)(x, y), [x, y])
    assert relative(results[memory][0], full[0]) > 1e-4  # autocast did something
    assert seen[-1] == torch.float32


def test_autocast_around_the_backward_pass_alone_is_not_taken_up():
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    chain = tiny_chain(4, dtype=torch.float32)
    expected = pull(chain(x, y), [x, y])
    outputs = chain(x, y)
    seen: list[bool] = []
    chain.denoiser.unet.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled(DEVICE.type)))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        pull(outputs, [x, y])
    assert seen and not any(seen) and expected[0].norm() > 0


def test_autocast_leaves_no_frozen_weights_behind():
    """Casts that a run made of frozen weights must not serve the caller's own training step in the same autocast."""
    net = TinyNet()
    x, _ = latents(1, 3, 4, dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        tiny_chain(2, dtype=torch.float32, network=net)(x)
        net(x, torch.tensor(1, device=DEVICE), conditions(dtype=torch.float32)[0]).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
