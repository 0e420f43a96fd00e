"""DDIM, BDIA and O-BELM: against diffusers, against plain autograd, and there and back."""

from __future__ import annotations

import pytest
import torch
from conftest import Counting, TinyNet, conditions, golden_denoiser, latents, pull, relative, sd_scheduler
from tolerances import FP64, FP64_UNDONE

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.optimization.loop import optimize
from doodl_fast.solvers.bdia import BDIA, bdia_program
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.obelm import OBELM

INVERTIBLE = {"BDIA": (BDIA, {}), "BDIA, gamma 0.5": (BDIA, {"gamma": 0.5}), "O-BELM": (OBELM, {})}
ALL = {"DDIM": (DDIM, {}), **INVERTIBLE}


def chain_of(name, steps=6, memory="checkpoint", network=None, dtype=torch.float64, **options):
    solver, own = ALL[name]
    denoiser = Denoiser(network or TinyNet().to(dtype), *conditions(dtype=dtype), 3.0, vjp_dtype=None)
    return solver(denoiser, Schedule.from_scheduler(sd_scheduler(), steps), memory=memory, **own, **options)


@pytest.mark.parametrize("final_alpha", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_that_of_diffusers(prediction_type, final_alpha):
    scheduler = sd_scheduler(prediction_type=prediction_type, set_alpha_to_one=final_alpha)
    denoiser = golden_denoiser(torch.float64)
    x = latents(1, 4, 16, 16)[0]
    scheduler.set_timesteps(10)
    expected = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected = scheduler.step(denoiser(expected, t), t, expected).prev_sample
    (picture,) = DDIM(denoiser, Schedule.from_scheduler(scheduler, 10))(x)
    assert relative(picture, expected) < 1e-6  # diffusers keeps its alphas in fp32


@pytest.mark.parametrize("name", ALL)
def test_the_first_step_is_ddims(name):
    chain, x = chain_of(name, steps=1), latents(1, 3, 4)[0]
    assert relative(chain(x)[0], chain_of("DDIM", steps=1)(x)[0]) < 1e-15


@pytest.mark.parametrize("name", ALL)
def test_one_network_call_for_each_step(name):
    network = Counting(TinyNet().double())
    chain = chain_of(name, steps=6, network=network)
    x = latents(1, 3, 4, grad=True)[0]
    ends = chain(x)
    assert len(network.calls) == chain.num_network_calls == 5  # the schedule's last step changes nothing
    pull(ends, [x])
    assert len(network.calls) == 10


@pytest.mark.parametrize("memory", ["checkpoint", "auto", 1, 2, "reversible"])
@pytest.mark.parametrize("name", ALL)
def test_gradient_is_that_of_plain_autograd(name, memory):
    if name == "DDIM" and memory not in ("checkpoint", "auto"):
        with pytest.raises(ValueError, match=r"undoes couplings, and this solver has some that forget their target"):
            chain_of(name, memory=memory)
        return
    cond, uncond = (c.requires_grad_() for c in conditions())
    x = latents(2, 3, 4, grad=True)[0]
    solver, own = ALL[name]
    gradients = []
    for mode in ("naive", memory):
        denoiser = Denoiser(TinyNet().double(), cond, uncond, 3.0)
        chain = solver(denoiser, Schedule.from_scheduler(sd_scheduler(), 6), memory=mode, **own)
        gradients.append(pull(chain(x), [x, cond, uncond]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert relative(got, want) < FP64


@pytest.mark.parametrize("name", INVERTIBLE)
def test_there_and_back(name):
    chain, x = chain_of(name, steps=8), latents(1, 3, 4)[0]
    noise, rest = chain.inverse(*chain(x))
    assert relative(noise, x) < FP64_UNDONE and rest.abs().max() < FP64_UNDONE
    # A picture that no chain has made comes back too, if what lies beside the noise is kept.
    picture, before = latents(1, 3, 4, seed=5)
    again = chain(*chain.inverse(picture, before))
    assert relative(again[0], picture) < 1e-9 and relative(again[1], before) < 1e-9


@pytest.mark.parametrize("name", INVERTIBLE)
def test_exact_arithmetic_comes_back_to_the_bit(name):
    chain = chain_of(name, steps=8, arithmetic="exact", dtype=torch.float32)
    start = chain.state(latents(1, 3, 4, dtype=torch.float32)[0])
    back = chain.inverse_state(chain.forward_state(start))
    assert all(torch.equal(a, b) for a, b in zip(back.tensors(), start.tensors(), strict=True))
    x = latents(1, 3, 4, grad=True)[0]
    exact, plain = chain_of(name, steps=8, arithmetic="exact64"), chain_of(name, steps=8)
    assert relative(exact(x)[0], plain(x)[0]) < 1e-8
    assert relative(*(pull(each(x), [x])[0] for each in (exact, plain))) < 1e-6


def test_ddim_cannot_be_inverted():
    chain, x = chain_of("DDIM"), latents(1, 3, 4)[0]
    with pytest.raises(ValueError, match=r"inverse: DDIM cannot be inverted, .* such as doodl_fast.EDICT"):
        chain.inverse(x)


@pytest.mark.parametrize("gamma", [0.0, -0.1, 1.1, True, "1", float("nan")])
def test_bad_gamma(gamma):
    with pytest.raises(ValueError, match=r"gamma: expected a number in \(0, 1\], got .*; 1.0 is the paper's choice"):
        bdia_program(Schedule.from_scheduler(sd_scheduler(), 4), gamma)


@pytest.mark.parametrize("name", ALL)
def test_optimize_takes_chains_of_one_latent(name):
    """One plain step of gradient descent, against autograd and an update by hand."""
    chain, x = chain_of(name), latents(1, 3, 4, dtype=torch.float32, grad=True)[0]

    def loss(images):
        return (images - 1).square().mean()

    value = loss(chain(x)[0])
    (gradient,) = torch.autograd.grad(value, x)
    seen = []
    result = optimize(
        chain,
        x.detach(),
        lambda z: z,
        loss,
        1,
        grad_scale=0.1,
        momentum=0.0,
        clip_grad_value=None,
        renormalize_latents=False,
        perturbation_scale=0.0,
        progress=False,
        callback_on_step_end=seen.append,
    )
    assert result.losses == [pytest.approx(float(value), rel=1e-6)]
    assert len(seen[0].images) == len(result.images) == 1
    # The loop halves the gradient, as it minimises the mean of a pair's losses.
    torch.testing.assert_close(result.latents[0], x.detach() - 0.05 * gradient)
    assert torch.equal(*result.latents)
