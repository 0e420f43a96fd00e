"""The solvers on flows: against diffusers' own loop and plain autograd, there and back, and from sigma 1."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Counting, TinyNet, conditions, latents, pull, relative
from gaussian_mixture import MEAN, exact_solution, ideal_output
from tolerances import FP32, FP64, FP64_UNDONE
from torch import Tensor

from doodl_fast.chain.chain import Chain
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.optimization.one_step_guidance import OneStepGuidance
from doodl_fast.solvers.bdia import BDIA
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT, edict_program, flow_coefficients
from doodl_fast.solvers.obelm import OBELM

INVERTIBLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "EDICT": (EDICT, {}),
    "BDIA": (BDIA, {}),
    "BDIA, gamma 0.5": (BDIA, {"gamma": 0.5}),
    "O-BELM": (OBELM, {}),
}
ALL = {"DDIM": (DDIM, {}), **INVERTIBLE}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "shift": ({"shift": 3.0}, {}),
    "dynamic": ({"use_dynamic_shifting": True}, {"mu": 0.8}),
    "dynamic, linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.3}),
    "FLUX": ({"use_dynamic_shifting": True}, {"mu": 1.15, "sigmas": list(np.linspace(1.0, 1 / 6, 6))}),
    "terminal": ({"shift_terminal": 0.1}, {}),
    "Karras": ({"use_karras_sigmas": True}, {}),
    "exponential": ({"use_exponential_sigmas": True}, {}),
    "beta": ({"use_beta_sigmas": True}, {}),
}
STEPS = 6


def flow(steps: int = STEPS, **options: Any) -> Schedule:
    return Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(**options), steps)


def chain_of(name: str, network: Any = None, dtype: torch.dtype = torch.float64, **options: Any) -> Chain:
    solver, own = ALL[name]
    schedule = options.pop("schedule", None) or flow(shift=3.0)
    denoiser = Denoiser(network or TinyNet().to(dtype), *conditions(dtype=dtype), 3.0, vjp_dtype=None)
    return solver(denoiser, schedule, **own, **options)


@pytest.mark.parametrize("name", SETTINGS)
def test_ddim_is_the_loop_of_diffusers(name: str) -> None:
    options, given = SETTINGS[name]
    if name == "beta":
        pytest.importorskip("scipy")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    schedule = Schedule.from_scheduler(scheduler, STEPS, **given)
    scheduler.set_timesteps(STEPS, **given)
    assert len(schedule) == STEPS and schedule.is_flow and schedule.sigmas[-1] == 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        denoiser = Denoiser(TinyNet().to(dtype), *conditions(dtype=dtype), 3.0)
        x = expected = latents(1, 3, 4, 4, dtype=dtype)[0]
        with torch.no_grad():
            for k, t in enumerate(scheduler.timesteps):
                output = denoiser(expected, t)
                if dtype == torch.float32:
                    expected = scheduler.step(output, t, expected).prev_sample
                else:  # diffusers' step computes in float32, so this is its sum in float64
                    expected = expected + (scheduler.sigmas[k + 1].double() - scheduler.sigmas[k].double()) * output
        assert relative(DDIM(denoiser, schedule)(x)[0], expected) < tolerance


@pytest.mark.filterwarnings("ignore:.*its second-order steps:RuntimeWarning")
def test_heuns_levels_are_eulers() -> None:
    heun = Schedule.from_scheduler(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), STEPS)
    assert len(heun) == STEPS and len(heun.sigmas) == STEPS + 1 and heun.sigmas[0] == 1
    # Heun shifts twice, as it derives its extreme sigmas from shifted ones; its levels are those of its own loop.
    own = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    own.set_timesteps(STEPS)
    assert heun.sigmas == tuple(dict.fromkeys(own.sigmas.double().tolist()))


@pytest.mark.parametrize("name", ALL)
def test_the_first_step_is_eulers(name: str) -> None:
    schedule = Schedule.flow([1000], [1.0, 0.7])
    x = latents(1, 3, 4)[0]
    options = {"mix_weight": 1.0} if name == "EDICT" else {}
    found = chain_of(name, schedule=schedule, **options)(x)[0]
    assert relative(found, chain_of("DDIM", schedule=schedule)(x)[0]) < 1e-15


@pytest.mark.parametrize("name", ALL)
def test_a_perfect_network_leads_from_noise_to_the_mixture(name: str) -> None:
    """At sigma 1, where there is no signal, every step is finite, and the pictures have the mixture's values."""

    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        sigma = float(t) / 1000
        return ideal_output(x, 1 - sigma, sigma, "flow")

    solver, own = ALL[name]
    if name == "EDICT":
        own = {"mix_weight": 0.97}
    x = torch.linspace(-2.2, 2.2, 9, dtype=torch.float64)[None]

    def picture(kind: Any, steps: int, options: dict[str, Any]) -> Tensor:
        return kind(Denoiser(network, None), flow(steps), **options)(x)[0]

    near = 1e-4  # the exact solution has a singular clock at both ends, where one step of Euler's is exact enough
    late = exact_solution(x - near * (x - MEAN), (near, 1 - near), (1 - near, near))
    truth = late - near * ideal_output(late, 1 - near, near, "flow")
    errors = [float((picture(solver, steps, own) - truth).abs().max()) for steps in (30, 90)]
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.15, errors


def test_the_second_latent_of_edict_is_not_moved_twice() -> None:
    """From pure noise an ideal network says nothing but the mean, so both latents must take DDIM's step."""
    denoiser = Denoiser(lambda x, t, cond: ideal_output(x, 0.0, 1.0, "flow"), None)
    x = latents(1, 3, 4)[0]
    ends = EDICT(denoiser, Schedule.flow([1000], [1.0, 0.7]), mix_weight=1.0)(x)
    for end in ends:
        assert relative(end, 0.7 * x + 0.3 * MEAN) < 1e-14
    assert flow_coefficients(1.0, 0.7) == (0.7, pytest.approx(0.3), pytest.approx(-0.3))
    later = edict_program(Schedule.flow([900], [0.9, 0.7]))[0]
    assert (later.a, later.c, later.b) == (1.0, 0.0, 0.7 - 0.9)


@pytest.mark.parametrize("memory", ["checkpoint", "auto", 2, "reversible"])
@pytest.mark.parametrize("name", ALL)
def test_gradient_is_that_of_plain_autograd(name: str, memory: Any) -> None:
    if name == "DDIM" and memory not in ("checkpoint", "auto"):
        pytest.skip("DDIM cannot be undone")
    x = latents(1, 3, 4, grad=True)[0]
    gradients = [pull(chain_of(name, memory=mode)(x), [x])[0] for mode in ("naive", memory)]
    assert gradients[0].norm() > 0
    assert relative(gradients[1], gradients[0]) < FP64


@pytest.mark.parametrize("name", INVERTIBLE)
def test_there_and_back(name: str) -> None:
    chain, x = chain_of(name), latents(1, 3, 4)[0]
    assert relative(chain.inverse(*chain(x))[0], x) < FP64_UNDONE


@pytest.mark.parametrize("name", INVERTIBLE)
def test_exact_arithmetic_comes_back_to_the_bit(name: str) -> None:
    chain = chain_of(name, arithmetic="exact", dtype=torch.float32)
    start = chain.state(*latents(1, 3, 4, dtype=torch.float32)[: 2 if name == "EDICT" else 1])
    back = chain.inverse_state(chain.forward_state(start))
    assert all(torch.equal(a, b) for a, b in zip(back.tensors(), start.tensors(), strict=True))


def sd3_transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_transformer_of_stable_diffusion_3(name: str) -> None:
    """Random weights: the same latents as diffusers' loop for DDIM, and 0 differing bits for what can be undone."""
    transformer = Counting(sd3_transformer())
    generator = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(1, 5, 16, generator=generator), torch.randn(1, 12, generator=generator)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def network(x: Tensor, t: Tensor, cond: Tensor, pooled: Tensor) -> Tensor:
        transformer.calls.append((len(x), False))
        return transformer.network(x, cond, pooled, t.expand(len(x)), return_dict=False)[0]

    solver, own = ALL[name]
    exact = {} if name == "DDIM" else {"arithmetic": "exact"}
    schedule = Schedule.from_scheduler(scheduler, 4)
    chain = solver(Denoiser(network, text, pooled=pooled), schedule, **own, **exact)
    x = latents(1, 4, 8, 8, dtype=torch.float32)[0].cpu()
    with torch.no_grad():
        if name != "DDIM":
            start = chain.state(x)
            back = chain.inverse_state(chain.forward_state(start))
            assert all(torch.equal(a, b) for a, b in zip(back.tensors(), start.tensors(), strict=True))
            assert len(transformer.calls) == 2 * chain.num_network_calls
            return
        (found,) = chain(x)
        scheduler.set_timesteps(4)
        expected = x
        for t in scheduler.timesteps:
            output = network(expected, t, text, pooled)
            expected = scheduler.step(output, t, expected).prev_sample
    assert relative(expected, x) > 0.01
    assert relative(found, expected) < FP32


def test_what_is_refused() -> None:
    euler, heun = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler
    with pytest.raises(ValueError, match=r"mu: expected a number because .* has use_dynamic_shifting=True, got None"):
        flow(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"mu: expected None because .* use_dynamic_shifting=False, got 0.5"):
        Schedule.from_scheduler(euler(), 4, mu=0.5)
    with pytest.raises(ValueError, match=r"sigmas: expected None because FlowMatchHeun.* chooses them itself, got 2"):
        Schedule.from_scheduler(heun(), 2, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"sigmas: expected 4 numbers, one for each inference step, got 2"):
        Schedule.from_scheduler(euler(), 4, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"mu: expected None because DDIMScheduler is no flow, got 0.5"):
        Schedule.from_scheduler(diffusers.DDIMScheduler(clip_sample=False), 4, mu=0.5)
    with pytest.raises(ValueError, match="schedule: expected one with alphas_cumprod, got a flow's"):
        OneStepGuidance(Denoiser(TinyNet(), None), flow(), lambda z: z, lambda image: image.sum())
    with pytest.raises(ValueError, match=r"num_inference_steps: expected an int from 1 to 1000"):
        flow(0)
    with pytest.raises(ValueError, match="sigmas: expected 3, one more than there are timesteps, got 2"):
        Schedule.flow([9, 5], [1.0, 0.5])
    with pytest.raises(ValueError, match="sigmas: expected numbers that fall from 1 or less to 0 or more"):
        Schedule.flow([9, 5], [1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="alphas_cumprod: expected none because sigmas are given"):
        Schedule((9,), (0.5,), (0.6,), "flow", (1.0, 0.0))
    with pytest.raises(ValueError, match="prediction_type: expected 'flow' with sigmas, got 'epsilon'"):
        Schedule((9,), sigmas=(1.0, 0.0))
