"""Schedules: the recorded coefficients, every kind of scheduler, everything that is refused."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import golden, recorded_schedule, sd_scheduler

from doodl_fast.chain.program import count_network_calls
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers import edict_program
from doodl_fast.solvers.edict import EDICT, ddim_coefficients


@pytest.mark.parametrize("steps", [5, 10, 20, 25, 50])
def test_recorded_diffusers_schedule(steps):
    schedule = Schedule.from_scheduler(sd_scheduler(), steps)
    table = {k.rsplit("/", 1)[1]: v for k, v in golden("schedule").items() if k.startswith(f"diffusers/T{steps}/")}
    assert list(schedule.timesteps) == table["t"].tolist()
    assert list(schedule.alphas_cumprod) == table["alpha"].tolist()
    assert list(schedule.alphas_cumprod_prev) == table["alpha_prev"].tolist()


@pytest.mark.parametrize("scheduler", ["diffusers", "reference"])
@pytest.mark.parametrize("steps", [5, 10, 20, 25, 30, 50])
def test_recorded_coefficients(scheduler, steps):
    recorded = {k: golden("schedule")[f"{scheduler}/T{steps}/{k}"].tolist() for k in ("alpha", "alpha_prev")}
    steps_ = [
        ddim_coefficients(a, p, "epsilon") for a, p in zip(recorded["alpha"], recorded["alpha_prev"], strict=True)
    ]
    for key, mine in {
        "fwd_sample": [a for a, _, _ in steps_],
        "fwd_eps": [b for _, _, b in steps_],
        "rev_sample": [1 / a for a, _, _ in steps_],
        "rev_eps": [-b / a for a, _, b in steps_],
    }.items():
        expected = golden("schedule")[f"{scheduler}/T{steps}/{key}"].tolist()
        assert mine == pytest.approx(expected, rel=1e-12, abs=1e-14), key


def test_alternation_and_mixing():
    program = edict_program(recorded_schedule("reference", 5), 0.9)
    assert [k.target for k in program[:4]] == [0, 1, 0, 1]
    assert [k.target for k in program[4:8]] == [1, 0, 0, 1]
    assert (program[2].a, program[2].b) == (0.9, 0.0) and program[2].c == pytest.approx(0.1)
    assert [k.step for k in program] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 2
    assert program[0].tag == 800 and program[2].tag is None


def test_exact_no_ops_are_dropped():
    schedule = Schedule.from_scheduler(sd_scheduler(), 50)
    assert count_network_calls(edict_program(schedule)) == 98  # the step at t = 0 leads nowhere
    assert len(edict_program(schedule)) == 98 + 100
    assert len(edict_program(schedule, mix_weight=1.0)) == 98
    assert count_network_calls(edict_program(Schedule.from_scheduler(sd_scheduler(set_alpha_to_one=True), 50))) == 100


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_are_the_same_step(prediction_type):
    """One DDIM step from an exact network, whichever way it states its answer, lands on the same noise level."""
    alpha, alpha_prev, x0, eps = 0.3, 0.6, 1.7, -0.4
    x = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * eps
    said = {"v_prediction": math.sqrt(alpha) * eps - math.sqrt(1 - alpha) * x0, "sample": x0}[prediction_type]
    a, c, b = ddim_coefficients(alpha, alpha_prev, prediction_type)
    assert a * x + c * x + b * said == pytest.approx(math.sqrt(alpha_prev) * x0 + math.sqrt(1 - alpha_prev) * eps)


def test_scheduler_is_left_alone():
    scheduler = sd_scheduler()
    scheduler.set_timesteps(7)
    before = copy.deepcopy(vars(scheduler))
    Schedule.from_scheduler(scheduler, 50)
    after = vars(scheduler)
    assert before.keys() == after.keys()
    assert torch.equal(before["timesteps"], after["timesteps"]) and after["num_inference_steps"] == 7


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:.*not part of the chain:RuntimeWarning")
@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DDPMScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_schedulers_of_real_pipelines(name):
    """Whatever a pipeline samples with, its noise levels give DDIM's schedule."""
    base = sd_scheduler(steps_offset=1, prediction_type="v_prediction", timestep_spacing="leading")
    other = getattr(diffusers, name).from_config(base.config)
    expected = Schedule.from_scheduler(base, 20)
    assert Schedule.from_scheduler(other, 20) == expected
    assert expected.timesteps[-1] == 1 and expected.prediction_type == "v_prediction"
    assert expected.alphas_cumprod_prev[-1] == float(base.alphas_cumprod[0])


def test_steps_telescope_and_match_diffusers_leading():
    scheduler = sd_scheduler()
    for steps in (1, 7, 30, 1000):
        schedule = Schedule.from_scheduler(scheduler, steps)
        assert len(schedule) == steps
        assert schedule.alphas_cumprod_prev[:-1] == schedule.alphas_cumprod[1:]
        for t, prev in zip(schedule.timesteps, schedule.alphas_cumprod_prev, strict=True):
            at = t - 1000 // steps
            assert prev == float(scheduler.alphas_cumprod[at] if at >= 0 else scheduler.final_alpha_cumprod)


@pytest.mark.filterwarnings("ignore:.*its constant stride:RuntimeWarning")
@pytest.mark.parametrize("steps", [61, 103, 1000])
def test_trailing_has_no_step_too_many(steps):
    schedule = Schedule.from_scheduler(sd_scheduler(timestep_spacing="trailing"), steps)
    assert len(schedule) == steps and schedule.timesteps[0] == 999 and schedule.timesteps[-1] >= 0


def test_alphas_keep_their_precision():
    scheduler = sd_scheduler()
    scheduler.alphas_cumprod = golden("schedule")["reference/alphas_cumprod"]
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    assert Schedule.from_scheduler(scheduler, 50) == recorded_schedule("reference", 50)


def test_set_alpha_to_one_ends_without_noise():
    assert Schedule.from_scheduler(sd_scheduler(set_alpha_to_one=True), 10).alphas_cumprod_prev[-1] == 1.0


@pytest.mark.parametrize("as_dict", [True, False])
def test_duck_typed_scheduler(as_dict):
    class Own:
        alphas_cumprod = np.linspace(0.99, 0.01, 100)
        final_alpha_cumprod = 0.995
        config = {"prediction_type": "sample"} if as_dict else SimpleNamespace(prediction_type="sample")

        def set_timesteps(self, n):
            self.timesteps = np.arange(0, 100, 100 // n)[::-1]

    own = Own()
    schedule = Schedule.from_scheduler(own, 4)
    assert schedule.timesteps == (75, 50, 25, 0) and schedule.prediction_type == "sample"
    assert schedule.alphas_cumprod[0] == Own.alphas_cumprod[75] and schedule.alphas_cumprod_prev[-1] == 0.995
    assert not hasattr(own, "timesteps")


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (0, ValueError, r"num_inference_steps: expected an int from 1 to 1000 .* got 0"),
        (-3, ValueError, "num_inference_steps"),
        (1001, ValueError, "got 1001"),
        (2.5, TypeError, "num_inference_steps: expected an int, got 2.5"),
        (True, ValueError, "got True"),
        (None, TypeError, "got None"),
    ],
)
def test_bad_step_counts(steps, error, message):
    with pytest.raises(error, match=message):
        Schedule.from_scheduler(sd_scheduler(), steps)


def test_numpy_integers_are_ints():
    assert len(Schedule.from_scheduler(sd_scheduler(), np.int64(10))) == 10


def test_zero_terminal_snr_is_refused_where_it_is_met():
    zero = sd_scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"alphas_cumprod is 0 at timestep 999 .* rescale_betas_zero_snr=False"):
        Schedule.from_scheduler(zero, 10)
    assert Schedule.from_scheduler(sd_scheduler(rescale_betas_zero_snr=True), 10).timesteps[0] == 900


def test_bad_schedulers():
    with pytest.raises(TypeError, match="EDMEulerScheduler has no alphas_cumprod and is no flow-matching scheduler"):
        Schedule.from_scheduler(diffusers.EDMEulerScheduler(), 10)
    with pytest.raises(TypeError, match=r"expected a diffusers scheduler .* got str"):
        Schedule.from_scheduler("ddim", 10)
    with pytest.raises(TypeError, match="has no set_timesteps"):
        Schedule.from_scheduler(SimpleNamespace(alphas_cumprod=[0.9, 0.5]), 1)
    with pytest.raises(ValueError, match=r"prediction_type: expected one of .* got 'flow'"):
        Schedule.from_scheduler(sd_scheduler(prediction_type="flow"), 10)
    with pytest.raises(ValueError, match="timestep 1000 is not one of the scheduler's 1000"):
        Schedule.from_scheduler(sd_scheduler(steps_offset=1), 1000)


def test_fractional_timesteps_are_refused():
    class Fractional:
        alphas_cumprod = torch.linspace(0.99, 0.01, 100)

        def set_timesteps(self, n):
            self.timesteps = torch.tensor([50.5, 0.0])

    with pytest.raises(ValueError, match="expected whole numbers"):
        Schedule.from_scheduler(Fractional(), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1,), (0.5, 0.4), (0.6,)), "expected one length of at least 1, got 1, 2, 1"),
        (((), (), ()), "at least 1, got 0, 0, 0"),
        (((1,), (1.0,), (1.0,)), r"must lie in \(0, 1\)"),
        (((1,), (0.5,), (1.1,)), r"must lie in \(0, 1\)"),
        (((-1,), (0.5,), (1.0,)), "ints of at least 0"),
        (((float("nan"),), (0.5,), (1.0,)), "floats or ints of at least 0"),
        (((float("inf"),), (0.5,), (1.0,)), "floats or ints of at least 0"),
        (((True,), (0.5,), (1.0,)), "floats or ints of at least 0"),
        (((1,), (float("nan"),), (1.0,)), r"must lie in \(0, 1\)"),
    ],
)
def test_bad_tables(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


@pytest.mark.parametrize("weight", [0, -0.1, 1.0001, float("nan"), True, "0.9", None])
def test_bad_mix_weight(weight):
    with pytest.raises(ValueError, match=r"mix_weight: expected a number in \(0, 1\]"):
        edict_program(recorded_schedule("reference", 5), weight)


def test_a_table_made_by_hand_may_hold_fractions():
    """The network gets them as they are."""
    seen = []

    def network(x, t, cond):
        seen.append(float(t))
        return x

    schedule = Schedule((957.5, 20.25), (0.1, 0.8), (0.8, 1.0))
    EDICT(Denoiser(network, None), schedule)(torch.randn(1, 3, 2, 2))
    assert seen == [957.5, 957.5, 20.25, 20.25]
