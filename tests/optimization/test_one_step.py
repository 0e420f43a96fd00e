"""The one-step baseline against a recorded run of the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
import torch
from conftest import (
    DEVICE,
    TinyNet,
    conditions,
    golden,
    golden_denoiser,
    golden_meta,
    latents,
    recorded_schedule,
    relative,
    sd_scheduler,
)
from tolerances import FP64
from torch import Tensor

from doodl_fast.chain.chain import Chain
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.guided import Guided
from doodl_fast.diffusion.pipeline import Decoder, to_pil
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.guidance import Symmetry
from doodl_fast.optimization import OneStepGuidance, one_step
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT


def decode(z: Tensor) -> Tensor:
    return torch.tanh(z)


def loss(images: Tensor) -> Tensor:
    return (images - 0.3).square().mean()


def tiny(prediction_type: str = "epsilon", network: Any = None, steps: int = 5) -> EDICT:
    cond, uncond = conditions()
    denoiser = Denoiser(network or TinyNet().double(), cond, uncond, 3.0)
    return EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(prediction_type=prediction_type), steps))


def test_the_recorded_baseline() -> None:
    """Each call's loss, the final latents and the picture. The reference also scores the two calls at t = 0, where
    nothing is updated."""
    record, scale = golden("gen"), 30.0
    meta = golden_meta("gen")["one_step_baseline"]
    chain = EDICT(golden_denoiser(torch.float32), recorded_schedule("reference", 10))
    decoder, symmetry, losses = Decoder(tiny_pipeline.golden_vae()), Symmetry(), []

    def scored(images: Tensor) -> Tensor:
        value = symmetry(images)
        losses.append(scale * float(value.detach()))
        return value

    x, y = one_step(chain, record["init/latent"], decoder, scored, scale)
    assert len(losses) == 18
    assert np.allclose(losses, meta["losses"][:18], rtol=2e-6, atol=0)
    expected = record["one_step_baseline/final_latent"]
    assert relative(torch.cat([x, y]), expected) < 5e-6
    with torch.no_grad():
        assert relative(torch.cat(chain(record["init/latent"])), expected) > 5e-4  # the guidance shows
        picture = np.array(to_pil(decoder(x))[0])[::16, ::16]
    assert np.abs(picture.astype(int) - record["one_step_baseline/image/x.png"].cpu().numpy()).max() <= 1


def test_the_loss_falls_and_rises_with_the_sign_of_the_scale() -> None:
    start, _ = latents(2, 3, 4, 4)
    values = [float(loss(decode(one_step(tiny(), start, decode, loss, scale)[0]))) for scale in (-20.0, 0.0, 20.0)]
    assert values[0] > values[1] > values[2]
    unguided = tiny()(start)
    assert relative(one_step(tiny(), start, decode, loss, 0.0)[1], unguided[1]) < FP64


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_every_prediction_type_gives_the_same_pictures(prediction_type: str) -> None:
    network = TinyNet().double()
    alphas = dict(zip(tiny().schedule.timesteps, tiny().schedule.alphas_cumprod, strict=True))

    def other(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        signal, noise = math.sqrt(alphas[int(t)]), math.sqrt(1 - alphas[int(t)])
        eps = network(x, t, cond)
        clean = (x - noise * eps) / signal
        return clean if prediction_type == "sample" else signal * eps - noise * clean

    start, _ = latents(1, 3, 4, 4)
    expected = one_step(tiny(network=network), start, decode, loss, 5.0)
    got = one_step(tiny(prediction_type, other), start, decode, loss, 5.0)
    assert relative(torch.cat(got), torch.cat(expected)) < 1e-10


def test_the_gradient_is_that_of_the_one_step_picture() -> None:
    chain = tiny()
    guided = OneStepGuidance(chain.denoiser, chain.schedule, decode, loss, 2.0)
    x, _ = latents(1, 3, 4, 4)
    t, alpha = chain.schedule.timesteps[1], chain.schedule.alphas_cumprod[1]
    uncond = Denoiser(chain.denoiser.unet, chain.denoiser.uncond)

    def objective(z: Tensor) -> Tensor:
        s = math.sqrt(1 - alpha)
        return loss(decode(s * (z - s * uncond(z, t)) / math.sqrt(alpha) + (1 - s) * z))

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective(leaf), leaf)
    assert relative(guided.gradient(x, t), expected) < FP64
    with torch.no_grad():
        shifted = guided(x, t) - chain.denoiser(x, t)
    assert relative(shifted, 2.0 * math.sqrt(1 - alpha) * expected) < 1e-10


def test_pictures_do_not_depend_on_their_company() -> None:
    start, _ = latents(3, 3, 4, 4)
    together = one_step(tiny(), start, decode, loss, 5.0)
    alone = [one_step(tiny(), start[i : i + 1], decode, loss, 5.0) for i in range(3)]
    assert relative(together[0], torch.cat([pair[0] for pair in alone])) < 1e-10


@pytest.mark.parametrize("batch", [1, 3])
def test_the_unconditional_network_gets_its_own_extra_conditions(batch: int) -> None:
    cond, uncond = conditions()
    both = torch.tensor([[0.5], [-2.0]], dtype=torch.float64, device=DEVICE)
    denoiser = Denoiser(TinyNet().double(), cond, uncond, 3.0, shift=both)
    expected = Denoiser(TinyNet().double(), uncond, shift=both[:1])
    chain = tiny()
    guided = OneStepGuidance(denoiser, chain.schedule, decode, loss, 1.0)
    x, _ = latents(batch, 3, 4, 4)
    assert torch.equal(guided._unconditional(batch)(x, 100), expected(x, 100))


def test_weights_are_left_alone_and_gradients_refused() -> None:
    network = TinyNet().double()
    chain = tiny(network=network)
    start, _ = latents(1, 3, 4, 4, grad=True)
    x, y = one_step(chain, start, decode, loss, 1.0)
    assert not x.requires_grad and not y.requires_grad
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    guided = OneStepGuidance(chain.denoiser, chain.schedule, decode, loss, 1.0)
    with pytest.raises(RuntimeError, match=r"expected torch.no_grad\(\), got latents that require grad"):
        guided(start, chain.schedule.timesteps[0])
    with pytest.raises(RuntimeError, match="not differentiable"):
        Chain(guided, chain.program)(start)[0].sum().backward()


def test_errors() -> None:
    chain = tiny()
    with pytest.raises(TypeError, match="denoiser: expected a Denoiser, got TinyNet"):
        OneStepGuidance(TinyNet(), chain.schedule, decode, loss)
    with pytest.raises(TypeError, match="schedule: expected a Schedule, got list"):
        OneStepGuidance(chain.denoiser, [], decode, loss)
    with pytest.raises(ValueError, match="scale: expected a finite number, got nan"):
        OneStepGuidance(chain.denoiser, chain.schedule, decode, loss, math.nan)
    with pytest.raises(ValueError, match="t: expected one of the schedule's timesteps, got 3"):
        OneStepGuidance(chain.denoiser, chain.schedule, decode, loss)(latents(1, 3, 4, 4)[0], 3)


def test_pairs_of_conditions_have_their_unconditional_half() -> None:
    """The one-step prediction is unconditional, as that of two rows is."""
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: Tensor, shift: Tensor) -> Tensor:
        seen.append(shift)
        return x

    cond = torch.zeros(1, 2, 3)
    schedule = Schedule.from_scheduler(sd_scheduler(), 4)
    denoiser = Denoiser(network, cond, cond, 3.0, shift=Guided(torch.zeros(1, 1), torch.ones(1, 1)))
    guide = OneStepGuidance(denoiser, schedule, lambda z: z, lambda image: image.square().sum())
    guide.gradient(torch.randn(2, 3, 4, 4), schedule.timesteps[0])
    assert [leaf.tolist() for leaf in seen] == [[[0.0], [0.0]]]


@pytest.mark.parametrize("steps", [4, 5])
def test_ddim_under_guidance_is_the_sampler_of_diffusers(steps: int) -> None:
    """The steps are those of `DDIMScheduler.step`, given the guided noise prediction."""
    denoiser, scheduler = tiny().denoiser, sd_scheduler()
    chain = DDIM(denoiser, Schedule.from_scheduler(scheduler, steps))
    x = latents(2, 3, 4, 4)[0]
    guided = OneStepGuidance(denoiser, chain.schedule, decode, loss, 30.0)
    scheduler.set_timesteps(steps)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):  # so that its coefficients are not rounded to float32
        setattr(scheduler, name, getattr(scheduler, name).double())
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(guided(expected, int(t)), t, expected).prev_sample
    found = one_step(chain, x, decode, loss, 30.0)
    assert relative(found[0], expected) < 1e-10
    assert relative(found[0], chain(x)[0]) > 1e-4
    assert torch.equal(one_step(chain, x, decode, loss, 0.0)[0], chain(x)[0].detach())
