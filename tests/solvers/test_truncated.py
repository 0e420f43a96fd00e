"""Truncated gradients: against plain autograd with the dropped outputs detached, and what they cost."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from conftest import Counting, TinyNet, conditions, latents, pull, relative, sd_scheduler
from torch import Tensor

import doodl_fast
from doodl_fast import BDIA, DDIM, EDICT, OBELM, Denoiser, LastSteps, Rex, Sampler, SamplerSteps, Schedule

STEPS = 5  # of which DDIM's last one changes nothing


class DetachedBefore(TinyNet):
    """A network whose outputs count as constants at timesteps above a bound."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        output = super().forward(x, t, cond, shift)
        return output.detach() if float(t) > self.bound else output


def made(solver: Any, network: Any = None, **options: Any) -> Any:
    denoiser = Denoiser((network or TinyNet()).double(), *conditions(), 3.0)
    schedule = Schedule.from_scheduler(sd_scheduler(), STEPS)
    if solver is Sampler:
        scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
        schedule = SamplerSteps.from_scheduler(scheduler, STEPS)  # type: ignore[assignment]
    return solver(denoiser, schedule, **options)


@pytest.mark.parametrize("memory", ["checkpoint", "naive"])
@pytest.mark.parametrize("solver", [DDIM, EDICT, BDIA, OBELM])
def test_gradient_is_that_of_constant_outputs(solver: Any, memory: str) -> None:
    """Timesteps are 800, 600, 400 and 200; two are kept."""
    x = latents(1, 3, 4, grad=True)[0]
    reference = made(solver, DetachedBefore(500), memory="naive")
    chain = made(solver, memory=memory)
    whole = pull(chain(x), [x])[0]
    chain.last_steps = LastSteps(2 if solver is not EDICT else 3)  # EDICT's last step mixes its latents once more
    ends = chain(x)
    for found, expected in zip(ends, reference(x), strict=True):
        assert relative(found, expected) < 1e-12
    (found,), (expected,) = pull(ends, [x]), pull(reference(x), [x])
    assert relative(found, expected) < 1e-12 < relative(found, whole)
    chain.last_steps = LastSteps(STEPS)
    assert relative(pull(chain(x), [x])[0], whole) < 1e-12
    chain.last_steps = None
    assert relative(pull(chain(x), [x])[0], whole) < 1e-12


def test_added_noise_has_a_gradient_too() -> None:
    chain = made(Sampler)
    x = latents(1, 3, 4, grad=True)[0]
    noise = [z.requires_grad_() for z in chain.draw_noise(x)]
    whole = torch.autograd.grad(chain(x, noise)[0].sum(), [x, *noise])
    chain.last_steps = LastSteps(2)
    found = torch.autograd.grad(chain(x, noise)[0].sum(), [x, *noise])
    assert all(gradient.norm() > 0 for gradient in found)
    # The last steps' own noise has the whole gradient.
    assert relative(found[-1], whole[-1]) < 1e-12 and relative(found[0], whole[0]) > 1e-3


def test_cost() -> None:
    """Steps that are left out cost one call, without a graph."""
    network = Counting(TinyNet())
    chain = made(DDIM, network)
    chain.last_steps = LastSteps(1)
    x = latents(1, 3, 4, grad=True)[0]
    pull(chain(x), [x])
    assert len(network.calls) == 4 + 1 and sum(graph for _, graph in network.calls) == 1
    network.calls.clear()
    with torch.no_grad():
        chain(x)
    assert len(network.calls) == 4


def test_random_numbers_of_steps() -> None:
    draws = [LastSteps(2, 4, seed=1).draw() for _ in range(3)]
    assert len(set(draws)) == 1
    several = LastSteps(2, 4)
    assert {several.draw() for _ in range(60)} == {2, 3, 4}


def test_optimize_and_rex() -> None:
    chain = made(Rex, scheme="euler")
    chain.last_steps = LastSteps(2)
    result = doodl_fast.optimize(
        chain, latents(1, 3, 4)[0], lambda z: z, lambda z: z.square().mean(), 3, grad_scale=5, progress=False
    )
    assert result.final_loss < result.losses[0]


def test_what_is_refused() -> None:
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match="least: expected an int of at least 1, got"):
            LastSteps(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="most: expected at least 3, which is `least`, got 2"):
        LastSteps(3, 2)
    with pytest.raises(TypeError, match=r"last_steps: expected a LastSteps, .* None, got int; use LastSteps\(5\)"):
        made(DDIM).last_steps = 5
    with pytest.raises(ValueError, match="last_steps: expected None with arithmetic='exact'"):
        made(EDICT, arithmetic="exact").last_steps = LastSteps(2)
