"""How fast each sampler's error falls with the number of steps, on a model that is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gaussian_mixture import exact_solution, ideal_output, scaled_linear_alphas

from doodl_fast.chain.chain import Chain
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import PREDICTION_TYPES, Schedule
from doodl_fast.solvers.bdia import BDIA
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.obelm import OBELM

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
}


def schedule(steps: int, prediction_type: str = "epsilon") -> Schedule:
    """Evenly spaced timesteps from FIRST to LAST, of which the last one is where the sampler arrives."""
    assert (FIRST - LAST) % steps == 0
    timesteps = range(FIRST, LAST - 1, -(FIRST - LAST) // steps)
    alphas = tuple(ALPHAS[t] for t in timesteps)
    return Schedule(tuple(timesteps)[:-1], alphas[:-1], alphas[1:], prediction_type)


def model(prediction_type: str = "epsilon") -> Denoiser:
    def network(x, t, cond):
        alpha = ALPHAS[int(t)]
        return ideal_output(x, math.sqrt(alpha), math.sqrt(1 - alpha), prediction_type)

    return Denoiser(network, None)


def sample(solver: type[Chain], options: dict, steps: int, prediction_type: str = "epsilon") -> torch.Tensor:
    return solver(model(prediction_type), schedule(steps, prediction_type), **options)(START)[0]


def exact() -> torch.Tensor:
    levels = [(math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])) for t in (FIRST, LAST)]
    return exact_solution(START, *levels)


@pytest.mark.parametrize("name", SOLVERS)
def test_order(name):
    """The slope of log(error) over log(steps) is the order of the method, with its sign changed."""
    solver, options, low, high = SOLVERS[name]
    truth = exact()
    errors = [float((sample(solver, options, steps) - truth).abs().max()) for steps in COUNTS]
    slope = -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
    assert low < slope < high, errors


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
    torch.testing.assert_close(sample(solver, options, 36, prediction_type), expected, rtol=1e-9, atol=1e-11)
