"""How fast each sampler's error falls with the number of steps, on a model that is known in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_mixture import exact_solution, ideal_output, scaled_linear_alphas

from doodl_fast.chain.chain import Chain
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import PREDICTION_TYPES, Schedule
from doodl_fast.diffusion.tracing import SamplerSteps
from doodl_fast.solvers.bdia import BDIA
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.obelm import OBELM
from doodl_fast.solvers.rex import Rex
from doodl_fast.solvers.sampler import Sampler

ALPHAS = scaled_linear_alphas()
FIRST, LAST = 950, 50
COUNTS = (36, 60, 90, 180)
START = torch.linspace(-2.2, 2.2, 9, dtype=torch.float64)[None]
SOLVERS = {
    "DDIM": (DDIM, {}, 0.85, 1.2),
    "EDICT": (EDICT, {}, 0.85, 1.2),
    "BDIA, gamma 0.5": (BDIA, {"gamma": 0.5}, 0.85, 1.2),
    "BDIA, gamma 1": (BDIA, {"gamma": 1.0}, 1.8, 2.3),
    "O-BELM": (OBELM, {}, 1.8, 2.3),
    "Rex, Euler": (Rex, {"scheme": "euler"}, 0.85, 1.3),
    "Rex, midpoint": (Rex, {"scheme": "midpoint"}, 1.8, 2.5),
    "Rex, Heun": (Rex, {"scheme": "heun"}, 1.8, 2.5),
    "Rex, RK4": (Rex, {"scheme": "rk4"}, 3.5, 4.6),
}


def schedule(steps: int, prediction_type: str = "epsilon") -> Schedule:
    """Evenly spaced timesteps from FIRST to LAST, of which the last one is where the sampler arrives."""
    assert (FIRST - LAST) % steps == 0
    timesteps = range(FIRST, LAST - 1, -(FIRST - LAST) // steps)
    alphas = tuple(ALPHAS[t] for t in timesteps)
    return Schedule(tuple(timesteps)[:-1], alphas[:-1], alphas[1:], prediction_type, training_alphas=tuple(ALPHAS))


def flow(steps: int) -> Schedule:
    """Evenly spaced sigmas from 0.95 to 0.05."""
    sigmas = np.linspace(0.95, 0.05, steps + 1).tolist()
    return Schedule.flow([1000 * sigma for sigma in sigmas[:-1]], sigmas)


def level_at(t: float) -> tuple[float, float]:
    """Signal and noise at a timestep; between whole ones log(noise / signal) is linear, as in diffusers."""
    low = min(int(t), len(ALPHAS) - 2)
    ends = [0.5 * math.log((1 - ALPHAS[k]) / ALPHAS[k]) for k in (low, low + 1)]
    s = math.exp(ends[0] + (t - low) * (ends[1] - ends[0]))
    return 1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s)


def model(prediction_type: str = "epsilon") -> Denoiser:
    def network(x, t, cond):
        return ideal_output(x, *level_at(float(t)), prediction_type)

    return Denoiser(network, None)


def flow_model() -> Denoiser:
    return Denoiser(lambda x, t, cond: ideal_output(x, 1 - float(t) / 1000, float(t) / 1000, "flow"), None)


def sample(solver: type[Chain], options: dict, steps: int, prediction_type: str = "epsilon") -> torch.Tensor:
    return solver(model(prediction_type), schedule(steps, prediction_type), **options)(START)[0]


def exact() -> torch.Tensor:
    levels = [(math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])) for t in (FIRST, LAST)]
    return exact_solution(START, *levels)


@pytest.mark.parametrize("name", SOLVERS)
def test_order(name):
    """The slope of log(error) over log(steps) is the order of the method, with its sign changed."""
    solver, options, low, high = SOLVERS[name]
    check_slope([sample(solver, options, steps) for steps in COUNTS], exact(), low, high)


def check_slope(found: list[torch.Tensor], truth: torch.Tensor, low: float, high: float) -> None:
    errors = [float((picture - truth).abs().max()) for picture in found]
    slope = -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
    assert low < slope < high, (slope, errors)


@pytest.mark.parametrize("name", SOLVERS)
def test_order_on_flows(name):
    solver, options, low, high = SOLVERS[name]
    found = [solver(flow_model(), flow(steps), **options)(START)[0] for steps in COUNTS]
    check_slope(found, exact_solution(START, (0.05, 0.95), (0.95, 0.05)), low, high)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_order_of_multistep_solvers(kind):
    """Diffusers' DPM-Solver++ 2M and UniPC, of a scheduler whose first and last timesteps are FIRST and LAST."""
    import diffusers

    kept = np.array([1.0, *ALPHAS[LAST : FIRST + 1]])
    found = []
    for steps in COUNTS:
        scheduler = getattr(diffusers, kind)(
            num_train_timesteps=FIRST - LAST + 1,
            trained_betas=1 - kept[1:] / kept[:-1],
            final_sigmas_type="sigma_min",
            timestep_spacing="linspace",
        )

        def network(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
            return ideal_output(x, *level_at(LAST + float(t)), "epsilon")

        found.append(Sampler(Denoiser(network, None), SamplerSteps.from_scheduler(scheduler, steps))(START)[0])
    check_slope(found, exact(), 1.8, 2.4)


def test_the_exact_solution_is_exact():
    """A single Gaussian has a solution in elementary functions; the mixture's is as good when the steps are halved."""
    levels = [(math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])) for t in (FIRST, LAST)]
    assert float((exact_solution(START, *levels, steps=1000) - exact()).abs().max()) < 1e-9


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_kind_of_network_gives_the_same_picture(name, prediction_type):
    """A network that predicts eps, v or the picture carries the same knowledge, so the sampler must agree."""
    solver, options, _, _ = SOLVERS[name]
    expected = sample(solver, options, 36)
    # Rex's fractional timesteps reach the network in float32, and an analytic network reads its noise level off them.
    tolerance = {"rtol": 1e-7, "atol": 1e-8} if solver is Rex else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(sample(solver, options, 36, prediction_type), expected, **tolerance)
