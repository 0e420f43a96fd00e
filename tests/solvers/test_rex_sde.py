"""Rex for the SDE: against diffusers' first step and a fine simulation, gradients of its noise, there and back."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Counting, TinyNet, conditions, latents, pickled, pull, relative, sd_scheduler
from gaussian_mixture import ideal_eps
from test_orders import COUNTS, FIRST, LAST, flow_model, level_at, model
from test_orders import flow as mixture_flow
from test_orders import schedule as mixture_schedule
from tolerances import FP32, FP64, FP64_UNDONE

import doodl_fast
from doodl_fast import Denoiser, RexSDE, Schedule
from doodl_fast.chain.chain import Chain

SCHEMES = ("euler", "midpoint", "heun", "rk4")
FLOW = Schedule.flow([900, 700, 500, 200], [0.9, 0.7, 0.5, 0.2, 0.0])


def diffusion(steps: int = 4, **changes: Any) -> Schedule:
    return Schedule.from_scheduler(sd_scheduler(**changes), steps)


SCHEDULES = {"diffusion": diffusion(timestep_spacing="trailing", set_alpha_to_one=True), "flow": FLOW}
"""Both lead to a picture without noise in their last step."""


def chain_of(schedule: Schedule, scheme: str = "euler", network: Any = None, **options: Any) -> RexSDE:
    dtype = torch.float64
    denoiser = Denoiser(network or TinyNet().to(dtype), *conditions(dtype=dtype), 3.0, vjp_dtype=None)
    return RexSDE(denoiser, schedule, scheme, **options)


def test_the_first_euler_step_of_equal_latents_is_that_of_diffusers() -> None:
    """SDE-DPM-Solver++ of first order is the exponential Euler step of the same equation."""
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        sd_scheduler().config, algorithm_type="sde-dpmsolver++", solver_order=1
    )
    scheduler.set_timesteps(5)
    alphas = [1 / (1 + float(sigma) ** 2) for sigma in scheduler.sigmas.double()]
    timesteps = tuple(int(t) for t in scheduler.timesteps)
    chain = chain_of(Schedule(timesteps, tuple(alphas[:-1]), tuple(alphas[1:])))
    x, z = latents(1, 3, 4)
    with torch.no_grad():
        output = chain.denoiser(x, timesteps[0])
        expected = scheduler.step(output, scheduler.timesteps[0], x, variance_noise=z).prev_sample
    chain.step_noise = [z, *chain.draw_noise(x)[1:]]
    found = Chain(chain.evaluator, chain.program[:1])(x)[0]
    assert relative(found, expected) < FP32  # diffusers keeps its sigmas in fp32


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("scheme", ["euler", "midpoint"])
def test_it_follows_the_path_of_its_noise(scheme: str, kind: str) -> None:
    """Strong order 1: against 7200 plain Euler-Maruyama steps of `du = picture dq + dW` on the same Brownian motion."""
    fine, batch = 7200, 32
    if kind == "flow":
        passed = [(1 - sigma, sigma) for sigma in np.linspace(0.95, 0.05, fine + 1)]
    else:
        passed = [level_at(t) for t in np.linspace(FIRST, LAST, fine + 1)]
    times = torch.tensor([(signal / noise) ** 2 for signal, noise in passed], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(batch, 9, generator=generator, dtype=torch.float64)
    moves = torch.randn(fine, batch, 9, generator=generator, dtype=torch.float64)
    moves *= times.diff().sqrt().reshape(-1, 1, 1)
    u = start * passed[0][0] / passed[0][1] ** 2
    for (signal, noise), h, move in zip(passed, times.diff().tolist(), moves, strict=False):
        x = u * noise**2 / signal
        u = u + h * (x - noise * ideal_eps(x, signal, noise)) / signal + move
    truth = u * passed[-1][1] ** 2 / passed[-1][0]

    errors = []
    for steps in COUNTS:
        denoiser, schedule = (
            (flow_model(), mixture_flow(steps)) if kind == "flow" else (model(), mixture_schedule(steps))
        )
        chain = RexSDE(denoiser, schedule, scheme)
        lengths = times[:: fine // steps].diff()
        whole = moves.reshape(steps, fine // steps, batch, 9).sum(1)
        noise = [move / math.sqrt(h) for move, h in zip(whole, lengths.tolist(), strict=True)]
        errors.append(float((chain(start, noise=noise)[0] - truth).square().mean().sqrt()))
    slope = -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
    assert 0.85 < slope < 1.4, (slope, errors)


@pytest.mark.parametrize("memory", ["checkpoint", "auto", 2, "reversible"])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_start_noise_and_conditions_are_plain_autograds(scheme: str, kind: str, memory: Any) -> None:
    x = latents(1, 3, 4, grad=True)[0]
    gradients = []
    for mode in ("naive", memory):
        cond, uncond = (c.requires_grad_() for c in conditions())
        chain = RexSDE(Denoiser(TinyNet().double(), cond, uncond, 3.0), SCHEDULES[kind], scheme, memory=mode)
        noise = [z.requires_grad_() for z in chain.draw_noise(x.detach(), seed=4)]
        if mode == "auto":
            chain.step_noise = [z.detach() for z in noise]
        gradients.append(pull(chain(x, noise=noise), [x, *noise, cond, uncond]))
    assert len(noise) == 3
    # Undoing a step divides by its a, which are small: in four steps they make up a factor of thousands.
    tolerance = 10 * FP64_UNDONE if memory in (2, "reversible") else FP64
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < tolerance


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_noise_leads_back(scheme: str, kind: str) -> None:
    x, _ = latents(1, 3, 4)
    chain = chain_of(SCHEDULES[kind], scheme)
    noise, other = chain.draw_noise(x, seed=1), chain.draw_noise(x, seed=2)
    ends = chain(x, noise=noise)
    back = chain.inverse(*ends, noise=noise)
    assert all(relative(latent, x) < 100 * FP64_UNDONE for latent in back)
    assert relative(chain(x, noise=other)[0], ends[0]) > 0.05
    assert relative(chain.inverse(*ends, noise=other)[0], x) > 0.05
    exact = chain_of(SCHEDULES[kind], scheme, arithmetic="exact64")
    exact.step_noise = noise
    start = exact.state(x)
    picture = exact.forward_state(start)
    assert exact.inverse_state(picture).equals(start)
    assert relative(picture.latents()[0], ends[0]) < 1e-4


def test_calls_of_the_network_and_where_noise_comes_from() -> None:
    network = Counting(TinyNet().double())
    chain = chain_of(diffusion(), "midpoint", network)
    x = latents(1, 3, 4, grad=True)[0]
    noise = chain.draw_noise(x.detach(), seed=3)
    ends = chain(x, noise=noise)
    assert len(network.calls) == chain.num_network_calls == 3 * 4  # The last step changes nothing.
    pull(ends, [x])
    assert len(network.calls) == 2 * chain.num_network_calls
    chain.step_noise = noise
    copy = pickled(chain)
    assert torch.equal(chain(x)[0], ends[0]) and torch.equal(copy(x)[0], ends[0])


def test_half_precision_networks() -> None:
    x = latents(1, 3, 4, dtype=torch.float32, grad=True)[0]
    half = Denoiser(TinyNet().half(), *conditions(dtype=torch.float16), 3.0, vjp_dtype=None)
    chain, exact = RexSDE(half, diffusion()), chain_of(diffusion(), "midpoint", TinyNet().half().double())
    noise = [z.requires_grad_() for z in chain.draw_noise(x.detach())]
    found, expected = chain(x, noise=noise)[0], exact(x.double(), noise=[z.double() for z in noise])[0]
    assert relative(found, expected) < 0.02
    gradients = (torch.autograd.grad((1e-9 * end).sum(), [x, *noise]) for end in (found, expected))
    assert all(relative(got, want) < 0.05 for got, want in zip(*gradients, strict=True))


def test_from_pipeline_and_optimize(tmp_path: Any) -> None:
    import tiny_pipeline

    pipe = tiny_pipeline.stable_diffusion(tmp_path)
    chain = doodl_fast.RexSDE.from_pipeline(pipe, "a dog", num_inference_steps=2, scheme="heun", memory="checkpoint")
    x = chain.noise()
    chain.step_noise = chain.draw_noise(x, seed=1)
    result = doodl_fast.optimize(chain, x, lambda z: z, lambda z: z.square().mean(), 3, grad_scale=5, progress=False)
    assert result.final_loss < result.losses[0] and len(result.images) == 1


def test_what_is_refused() -> None:
    chain, x = chain_of(diffusion()), latents(1, 3, 4)[0]
    with pytest.raises(
        ValueError, match=r"^noise: this chain's steps add noise, and there is none; call it with noise"
    ):
        chain(x)
    with pytest.raises(ValueError, match=r"^noise: expected 3 tensors, one for each step that adds noise, got 1; use"):
        chain(x, noise=[x])
    with pytest.raises(ValueError, match=r"^noise: expected 3 tensors, .* got 2"):
        chain.step_noise = [x, x]
    with pytest.raises(ValueError, match=r"^noise\[1\]: expected x's shape \(1, 3, 4\), got \(1, 3\)"):
        chain(x, noise=[x, x[..., 0], x])
    for schedule in (
        Schedule.flow([1000, 500], [1.0, 0.5, 0.0]),
        diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ):
        with pytest.raises(ValueError, match=r"schedule: expected a signal at every .* forgets its start, .* use Rex"):
            chain_of(schedule)
    with pytest.raises(ValueError, match="scheme: expected one of 'euler'"):
        chain_of(diffusion(), "rk5")
