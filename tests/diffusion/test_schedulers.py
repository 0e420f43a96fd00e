"""Every scheduler of diffusers: a chain does the same steps, says what it leaves out, or refuses it. None is silent.

The oracle is the scheduler's own `step`.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import relative, sd_scheduler
from tolerances import FP32
from torch import Tensor

from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.diffusion.scheduler_check import LEFT_OUT, REFUSED, SAME_UPDATE, SPACINGS
from doodl_fast.solvers.edict import ddim_coefficients

NAMES = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ARGUMENTS = {
    "AmusedScheduler": {"mask_token_id": 1},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "RFD4ProteinaScheduler": None,
}


def made(name: str, **options: Any) -> Any:
    """A scheduler with its defaults; with Stable Diffusion's noise levels where it takes them."""
    arguments = ARGUMENTS.get(name, {})
    if arguments is None:
        pytest.skip(f"{name} is no scheduler of a noise schedule: it takes a protein's frames")
    try:
        return getattr(diffusers, name)(**arguments, **options)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])


def network(x: Tensor, t: float) -> Tensor:
    """A prediction that depends on the point and on the timestep, and stays small."""
    return torch.tanh(x) * (0.3 + t / 2000)


def own_result(scheduler: Any, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Noise in the chain's scale, and what the scheduler's own steps make of it."""
    stepper = copy.deepcopy(scheduler)
    stepper.set_timesteps(steps)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = noise * float(getattr(stepper, "init_noise_sigma", 1.0))  # flows have none, nor do they scale their input
    scaled = getattr(stepper, "scale_model_input", lambda sample, t: sample)
    sigmas = getattr(stepper, "sigmas", None)
    if sigmas is not None and hasattr(stepper, "scale_model_input"):
        noise = sample / (1 + float(sigmas[0]) ** 2) ** 0.5
    for t in stepper.timesteps:
        prediction = network(scaled(sample, t), float(t))
        sample = stepper.step(prediction, t, sample, **options).prev_sample
    return noise, sample


def chain_result(schedule: Schedule, x: Tensor) -> Tensor:
    """A single latent through the schedule's DDIM steps, or Euler's of a flow."""
    for t, now, after in zip(schedule.timesteps, schedule.sigmas, schedule.sigmas[1:], strict=False):
        x = x + (after - now) * network(x, t)
    rows = zip(schedule.timesteps, schedule.alphas_cumprod, schedule.alphas_cumprod_prev, strict=not schedule.is_flow)
    for t, alpha, alpha_prev in rows:
        a, c, b = ddim_coefficients(alpha, alpha_prev, schedule.prediction_type)
        x = (a + c) * x + b * network(x, t)
    return x


def outcome(scheduler: Any, steps: int) -> tuple[Schedule | None, str]:
    """The schedule, or None where it is refused, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            schedule = Schedule.from_scheduler(scheduler, steps)
        except (TypeError, ValueError) as error:
            return None, str(error)
    return schedule, " ".join(str(w.message) for w in caught if issubclass(w.category, RuntimeWarning))


def check(scheduler: Any, steps: int = 10) -> str:
    """That nothing is silent: "same", "said" or "refused"."""
    name = type(scheduler).__name__
    schedule, said = outcome(scheduler, steps)
    if schedule is None:
        assert said.startswith(f"scheduler: {name} ")
        return "refused"
    if said:
        assert said.startswith(f"{name}: not part of the chain: ") and "sampled by DDIM" in said
        return "said"
    noise, expected = own_result(scheduler, steps)
    assert relative(chain_result(schedule, noise), expected) < FP32
    return "same"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_no_scheduler_is_silent(name: str) -> None:
    if name == "SchedulerMixin":
        pytest.skip("a base class")
    found = check(made(name))
    if found == "refused":  # by default DDIM clips
        scheduler = made(name)
        if getattr(scheduler, "config", {}).get("clip_sample") and hasattr(scheduler, "alphas_cumprod"):
            found = check(made(name, clip_sample=False))
    same = {"DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "EulerDiscreteScheduler"}
    same |= {"FlowMatchEulerDiscreteScheduler"}
    assert (found == "same") == (name in same)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 7, 10, 20, 50, 61])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_schedules_that_are_silent_are_the_schedulers_own(
    name: str, spacing: str, steps: int, prediction_type: str
) -> None:
    options = {"clip_sample": False} if "DDIM" in name else {}
    if name == "EulerDiscreteScheduler" and prediction_type == "sample":
        pytest.skip("diffusers' Euler does not take it")
    scheduler = made(name, **SD, **options, timestep_spacing=spacing, prediction_type=prediction_type)
    found = check(scheduler, steps)
    if spacing == "leading" and "DDIM" in name:
        assert found == "same"


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "LCMScheduler", "HeunDiscreteScheduler"]
)
@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_clipping_is_refused_with_the_way_to_switch_it_off(name: str, key: str) -> None:
    if name == "HeunDiscreteScheduler" and key == "thresholding":
        pytest.skip("Heun has no thresholding")
    scheduler = made(name, **{"clip_sample": False, key: True})
    with pytest.raises(
        ValueError, match=rf"scheduler: {name} has {key}=True.*from_config\(scheduler.config, {key}=False\)"
    ):
        Schedule.from_scheduler(scheduler, 10)
    off = type(scheduler).from_config(scheduler.config, **{key: False})
    assert outcome(off, 10)[0] is not None


def test_settings_that_a_scheduler_keeps_and_does_not_read_do_not_count() -> None:
    """Euler has no clipping, and keeps DDIM's setting in its config."""
    euler = diffusers.EulerDiscreteScheduler.from_config(diffusers.DDIMScheduler(**SD, clip_sample=True).config)
    assert euler.config["clip_sample"] is True
    assert outcome(euler, 10)[0] is not None


class Foreign:
    """A scheduler of another library."""

    alphas_cumprod = torch.linspace(0.99, 0.01, 100)
    config = {"clip_sample": True}

    def set_timesteps(self, n: int) -> None:
        self.timesteps = torch.arange(0, 100, 100 // n).flip(0)


def test_a_foreign_scheduler_that_clips_is_refused() -> None:
    with pytest.raises(ValueError, match="scheduler: Foreign has clip_sample=True"):
        Schedule.from_scheduler(Foreign(), 4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_few_step_schedulers_keep_their_timesteps(name: str, steps: int) -> None:
    scheduler = made(name, **SD)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    schedule, said = outcome(scheduler, steps)
    assert schedule is not None and list(schedule.timesteps) == own.timesteps.tolist()
    assert "the noise that it adds" in said and "its own timesteps" not in said
    if steps == 4:
        assert schedule.timesteps == (999, 759, 499, 259)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_deterministic_steps_of_tcd_are_its_own(steps: int, prediction_type: str) -> None:
    scheduler = made("TCDScheduler", **SD, prediction_type=prediction_type)
    schedule, _ = outcome(scheduler, steps)
    noise, expected = own_result(scheduler, steps, eta=0.0)
    assert schedule is not None and relative(chain_result(schedule, noise), expected) < FP32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("EulerAncestralDiscreteScheduler", {}, "DiscreteScheduler: not part of the chain: its ancestral noise"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas; its own timesteps"),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "its multistep updates; use_lu_lambdas"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "updates; the noise that it adds"),
        ("SASolverScheduler", {}, "the noise that it adds in every step; its multistep updates"),
        ("PNDMScheduler", {}, "its multistep updates"),
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}, "its constant stride of 100"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "its last step, which leads"),
        ("FlowMatchHeunDiscreteScheduler", {}, "its second-order steps. Its noise levels are sampled by DDIM, which"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "the noise that it adds in every step"),
        ("FlowMatchLCMScheduler", {}, "the noise that it adds in every step"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_named(name: str, options: dict[str, Any], message: str) -> None:
    noise_levels = {} if "Flow" in name else SD
    _, said = outcome(made(name, **noise_levels, **options), 10)
    assert message in said, said


def test_it_is_said_once_and_at_the_callers_line() -> None:
    with pytest.warns(RuntimeWarning, match="ancestral noise") as caught:
        Schedule.from_scheduler(diffusers.EulerAncestralDiscreteScheduler(), 10)
    assert [w.filename for w in caught if w.category is RuntimeWarning] == [__file__]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "Stable Video"),
        ("DDIMInverseScheduler", {}, "DDIMInverseScheduler runs from picture to noise; use DDIM"),
        ("DPMSolverMultistepInverseScheduler", {}, "runs from picture to noise"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "has invert_sigmas=True .as Mochi has"),
        ("RePaintScheduler", {}, "RePaintScheduler needs a picture and a mask"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "use_flow_"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_scheduler(made(name, **options), 10)


def test_a_subclass_is_known_by_its_base() -> None:
    class Own(diffusers.EulerAncestralDiscreteScheduler):
        pass

    assert outcome(Own(**SD), 10)[1].startswith("Own: not part of the chain: its ancestral noise")


def test_stable_diffusions_own_schedule_is_silent() -> None:
    assert check(sd_scheduler()) == "same" and check(sd_scheduler(steps_offset=1), 50) == "same"


def test_the_docs_name_every_scheduler() -> None:
    text = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    for name in (*LEFT_OUT, *SAME_UPDATE, *REFUSED, *SPACINGS):
        assert f"`{name}`" in text, name
