"""Every memory mode against plain autograd through the whole chain."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    DEVICE,
    MEMORIES,
    TinyNet,
    conditions,
    golden_denoiser,
    latents,
    pull,
    relative,
    sd_scheduler,
    tiny_chain,
)
from tolerances import FP64

from doodl_fast.chain.chain import Chain
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT

SHAPES = {
    "image": (1, 3, 4, 5),
    "images": (3, 3, 4, 5),
    "video": (1, 3, 2, 3, 4),
    "videos": (3, 3, 2, 3, 4),
    "flat": (3, 3),
}


def outcome(chain: Chain, inverse: bool, x, y, extra=()):
    outputs = (chain.inverse if inverse else chain)(x, y)
    inputs = [x, *([] if y is None else [y]), *extra]
    return outputs, pull(outputs, inputs)


def assert_same(chain: Chain, inverse: bool, x, y, extra=(), tolerance=1e-10):
    chain.memory = "naive"
    expected_out, expected = outcome(chain, inverse, x, y, extra)
    for memory in MEMORIES:
        chain.memory = memory
        out, grads = outcome(chain, inverse, x, y, extra)
        for got, want in zip(out, expected_out, strict=True):
            assert torch.equal(got, want), memory  # forward arithmetic is one and the same
        for got, want in zip(grads, expected, strict=True):
            assert want.norm() > 0 and relative(got, want) < tolerance, memory


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_of_latents(shape, steps, guidance_scale, inverse):
    assert_same(tiny_chain(steps, guidance_scale=guidance_scale), inverse, *latents(*shape, grad=True))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_types(prediction_type, inverse):
    assert_same(tiny_chain(5, prediction_type=prediction_type), inverse, *latents(2, 3, 4, grad=True))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_tied_start(inverse):
    x, _ = latents(2, 3, 4, grad=True)
    assert_same(tiny_chain(4), inverse, x, None)
    chain = tiny_chain(4)
    (tied,) = outcome(chain, inverse, x, None)[1]
    apart = outcome(chain, inverse, x, x.detach().clone().requires_grad_())
    other = latents(2, 3, 4, grad=True)[0]
    both = pull((chain.inverse if inverse else chain)(x, other), [x, other])
    assert apart[0][0].shape == x.shape and relative(tied, both[0] + both[1]) < FP64


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
def test_gradients_of_conditions(guided, batch):
    """Leaves and non-leaves, of one row and of a row a sample, and an extra condition."""
    cond, uncond = conditions(batch=batch)
    shift = torch.full((1,), 0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    cond.requires_grad_()
    base = uncond[:1].clone().requires_grad_()
    denoiser = Denoiser(TinyNet().double(), cond, base * 2, 3.0 if guided else 1.0, shift=shift)
    chain = EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), 5))
    x, y = latents(batch, 3, 4, grad=True)
    assert_same(chain, False, x, y, extra=(cond, shift, *((base,) if guided else ())))
    x.requires_grad_(False), y.requires_grad_(False)
    chain.memory = "checkpoint"
    assert pull(chain(x, y), [cond])[0].norm() > 0  # conditions alone


def test_only_one_of_the_latents_requires_grad():
    chain = tiny_chain(4)
    x, y = latents(1, 3, 4, grad=True)
    expected = pull(chain(x, y), [x, y])
    assert torch.equal(pull(chain(x.detach(), y), [y])[0], expected[1])
    assert torch.equal(pull(chain(x, y.detach()), [x])[0], expected[0])


@pytest.mark.parametrize("which", [0, 1])
def test_loss_on_one_output(which):
    chain = tiny_chain(3, memory="naive")
    x, y = latents(1, 3, 4, grad=True)
    expected = torch.autograd.grad(chain(x, y)[which].square().sum(), [x, y])
    for memory in MEMORIES:
        chain.memory = memory
        for got, want in zip(torch.autograd.grad(chain(x, y)[which].square().sum(), [x, y]), expected, strict=True):
            assert relative(got, want) < 1e-11


@pytest.mark.parametrize("memory", [*MEMORIES, "naive"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_gradcheck(memory, inverse):
    cond, _ = conditions()
    cond = cond[:, :2].clone().requires_grad_()
    x, y = latents(2, 2, 2, grad=True)
    net = TinyNet(channels=2).double()

    def function(x, y, cond):
        denoiser = Denoiser(net, cond, cond.flip(1) * 0.5, 2.0)
        chain = EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), 3), memory=memory)
        return (chain.inverse if inverse else chain)(x, y)

    assert torch.autograd.gradcheck(function, (x, y, cond))


def test_programs_of_other_shapes():
    """Couplings with a, b, c all at once (BDIA, BELM), several calls a step, steps of no call at all."""
    program = [
        Coupling(0, -0.7, 0.4, 0.9, step=0, tag=3),
        Coupling(0, 1.0, 0.0, -0.5, step=0, tag=4),
        Coupling(1, 1.3, -0.2, 0.0, step=1),
        Coupling(1, 0.8, 1.1, 0.6, step=2, tag=5),
        Coupling(0, 1.0, 0.3, 0.0, step=3),
    ]
    chain = Chain(Denoiser(TinyNet().double(), conditions()[0]), program)
    assert_same(chain, False, *latents(2, 3, 4, grad=True))
    assert_same(chain, True, *latents(2, 3, 4, grad=True))


def test_empty_program_and_constant_network():
    x, y = latents(1, 3, 4, grad=True)
    assert_same(Chain(Denoiser(TinyNet().double(), None), []), False, x, y)
    constant = Chain(Denoiser(lambda x, t, cond: torch.ones_like(x), None), [Coupling(0, 0.5, 0.1, 2.0, tag=1)])
    assert_same(constant, False, x, y)


def test_naive_is_twice_differentiable():
    x, _ = latents(1, 3, 2, grad=True)
    chain = tiny_chain(2, memory="naive")
    assert torch.autograd.gradgradcheck(lambda x: chain(x)[0], (x,))


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_diffusers_unet(guidance_scale):
    chain = EDICT(golden_denoiser(torch.float64, guidance_scale), Schedule.from_scheduler(sd_scheduler(), 3))
    assert_same(chain, False, *latents(2, 4, 8, 8, grad=True))
