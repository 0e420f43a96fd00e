"""Zero terminal signal-to-noise: DDIM's own first step, with right gradients, and undone where it can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyNet, latents, pull, relative, sd_scheduler, tiny_chain
from tolerances import FP32, FP64, FP64_UNDONE
from torch import Tensor

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.optimization.one_step_guidance import OneStepGuidance
from doodl_fast.solvers.bdia import BDIA
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT, ddim_coefficients, edict_program
from doodl_fast.solvers.obelm import OBELM

ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
PREDICTIONS = ["v_prediction", "sample"]


def scheduler(prediction_type: str, **changes: Any) -> Any:
    return sd_scheduler(prediction_type=prediction_type, **ZERO, **changes)


def chain(prediction_type: str, steps: int = 4, **options: Any) -> EDICT:
    denoiser = Denoiser(TinyNet().double(), None)
    schedule_options = options.pop("schedule_options", {})
    return EDICT(denoiser, Schedule.from_scheduler(scheduler(prediction_type, **schedule_options), steps), **options)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [2, 4, 10, 50])
def test_the_steps_of_equal_latents_are_ddims(prediction_type: str, steps: int) -> None:
    """Oracle: diffusers' own steps."""
    own, network = scheduler(prediction_type), TinyNet().double()
    own.set_timesteps(steps)
    x = expected = latents(1, 3, 4, 4)[0]
    schedule = Schedule.from_scheduler(own, steps)
    assert schedule.alphas_cumprod[0] == 0
    with torch.no_grad():
        for t in own.timesteps:
            expected = own.step(network(expected, t), t, expected).prev_sample
        for t, *alphas in zip(schedule.timesteps, schedule.alphas_cumprod, schedule.alphas_cumprod_prev, strict=True):
            a, c, b = ddim_coefficients(*alphas, prediction_type)
            x = (a + c) * x + b * network(x, torch.tensor(t))
    assert relative(x, expected) < FP32


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_chains_first_latent_takes_ddims_first_step(prediction_type: str) -> None:
    own = scheduler(prediction_type)
    own.set_timesteps(4)
    x = latents(1, 3, 4, 4)[0]
    whole = Schedule.from_scheduler(own, 4)
    first = Schedule(whole.timesteps[:1], whole.alphas_cumprod[:1], whole.alphas_cumprod_prev[:1], prediction_type)
    network = TinyNet().double()
    with torch.no_grad():
        expected = own.step(network(x, own.timesteps[0]), own.timesteps[0], x).prev_sample
        found, _ = EDICT(Denoiser(network, None), first, mix_weight=1.0)(x)
    assert relative(found, expected) < FP32


def test_many_steps_lead_where_ddim_leads() -> None:
    """Both latents: the second coupling of the first step must not step twice."""
    own, network = scheduler("v_prediction"), TinyNet().double()
    x = latents(1, 3, 4, 4)[0]
    distances = []
    for steps in (50, 100, 200):
        own.set_timesteps(steps)
        expected = x
        with torch.no_grad():
            for t in own.timesteps:
                expected = own.step(network(expected, t), t, expected).prev_sample
            ends = EDICT(Denoiser(network, None), Schedule.from_scheduler(own, steps))(x)
        distances.append(max(relative(end, expected) for end in ends))
    assert distances[2] < distances[1] < distances[0] and distances[2] < 0.02


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("memory", ["checkpoint", "reversible", 1, 3, "auto"])
def test_gradients_are_naive_autograds(prediction_type: str, memory: Any) -> None:
    x, y = latents(1, 3, 4, 4, grad=True)
    expected = pull(chain(prediction_type, memory="naive")(x, y), [x, y])
    found = pull(chain(prediction_type, memory=memory)(x, y), [x, y])
    assert all(relative(f, e) < 1e-10 for f, e in zip(found, expected, strict=True))
    assert all(e.norm() > 0 for e in expected)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_chain_can_be_undone(prediction_type: str) -> None:
    x, y = latents(1, 3, 4, 4)
    made = chain(prediction_type)
    back = made.inverse(*made(x, y))
    assert relative(back[0], x) < FP64_UNDONE and relative(back[1], y) < FP64_UNDONE
    exact = chain(prediction_type, arithmetic="exact64")
    start = exact.state(x, y)
    again = exact.inverse_state(exact.forward_state(start))
    assert torch.equal(again.x, start.x) and torch.equal(again.y, start.y)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_single_step_to_the_picture_forgets_its_latent_and_is_not_undone(prediction_type: str) -> None:
    one = {"steps": 1, "schedule_options": {"set_alpha_to_one": True}}
    x, y = latents(1, 3, 4, 4, grad=True)
    expected = pull(chain(prediction_type, memory="naive", **one)(x, y), [x, y])
    found = pull(chain(prediction_type, **one)(x, y), [x, y])
    assert relative(found[1], expected[1]) < FP64 and not expected[0].any() and not found[0].any()
    with pytest.raises(ValueError, match="inverse: EDICT cannot be inverted, because it has a step that forgets"):
        chain(prediction_type, **one).inverse(x.detach(), y.detach())


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("solver", [DDIM, BDIA, OBELM])
def test_the_other_solvers_start_there_too(solver: Any, prediction_type: str) -> None:
    """The pictures come nearer to DDIM's of many steps, and gradients are naive autograd's."""
    x, _ = latents(1, 3, 4, 4, grad=True)
    denoiser = Denoiser(TinyNet().double(), None)

    def picture(kind: Any, steps: int, memory: str = "checkpoint") -> Tensor:
        return kind(denoiser, Schedule.from_scheduler(scheduler(prediction_type), steps), memory=memory)(x)[0]

    (found,), (expected,) = (pull((picture(solver, 5, m),), [x]) for m in ("checkpoint", "naive"))
    assert relative(found, expected) < 1e-10 and expected.norm() > 0
    with torch.no_grad():
        truth = picture(DDIM, 1000)
        errors = [relative(picture(solver, steps), truth) for steps in (10, 100)]
    assert errors[1] < 0.3 * errors[0]  # of first order at least


def test_obelm_cannot_be_undone_from_there() -> None:
    x, y = latents(1, 3, 4, 4)
    with pytest.raises(ValueError, match="inverse: OBELM cannot be inverted"):
        OBELM(Denoiser(TinyNet().double(), None), Schedule.from_scheduler(scheduler("sample"), 4)).inverse(x, y)


def test_epsilon_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alphas_cumprod is 0 at timestep 999 .* a network that predicts epsilon"):
        Schedule.from_scheduler(scheduler("epsilon"), 10)
    with pytest.raises(ValueError, match="alpha: expected more than 0 with prediction_type='epsilon', got 0"):
        ddim_coefficients(0.0, 0.5, "epsilon")
    assert Schedule.from_scheduler(sd_scheduler(rescale_betas_zero_snr=True), 10).timesteps[0] == 900


def test_only_the_first_timestep_may_have_no_signal() -> None:
    with pytest.raises(ValueError, match="cumulative alphas at timestep 500 must lie in"):
        Schedule((999, 500), (0.0, 0.0), (0.5, 0.9), "v_prediction")
    with pytest.raises(ValueError, match="cumulative alphas at timestep 999 must lie in"):
        Schedule((999,), (0.0,), (0.0,), "v_prediction")


@pytest.mark.filterwarnings("ignore:.*not part of the chain:RuntimeWarning", "ignore::DeprecationWarning")
def test_schedulers_that_put_a_small_number_in_its_place_have_the_same_steps() -> None:
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_config(scheduler("v_prediction").config)
    assert float(euler.alphas_cumprod[-1]) == 2.0**-24
    assert Schedule.from_scheduler(euler, 10) == Schedule.from_scheduler(scheduler("v_prediction"), 10)


def test_one_step_guidance_says_that_it_has_no_hold_there() -> None:
    schedule = Schedule.from_scheduler(scheduler("v_prediction"), 4)
    with pytest.raises(ValueError, match=r"schedule: expected a signal at every timestep, got .* of 0 at 999"):
        OneStepGuidance(Denoiser(TinyNet(), None), schedule, lambda z: z, lambda image: image.sum())


def test_ordinary_schedules_have_the_same_program_as_before() -> None:
    schedule = tiny_chain(4, prediction_type="v_prediction").schedule
    alpha, alpha_prev = schedule.alphas_cumprod[0], schedule.alphas_cumprod_prev[0]
    first = edict_program(schedule)[0]
    assert first.a == (alpha_prev / alpha) ** 0.5
