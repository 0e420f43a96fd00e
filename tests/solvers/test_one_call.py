"""Gradients through one call of the network: against plain autograd, a single step, and DRaFT-LV's formula."""

from __future__ import annotations

import itertools
import random
from typing import Any

import diffusers
import pytest
import torch
from conftest import Counting, TinyNet, conditions, latents, pickled, pull, relative, sd_scheduler
from tolerances import FP64
from torch import Tensor

import doodl_fast
from doodl_fast import (
    BDIA,
    DDIM,
    EDICT,
    OBELM,
    Denoiser,
    LastSteps,
    LowVariance,
    Rex,
    Sampler,
    SamplerSteps,
    Schedule,
    StraightThrough,
)
from doodl_fast.solvers.coefficients import levels

STEPS = 5
FLOW = Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), STEPS)
LEADING = Schedule.from_scheduler(sd_scheduler(), STEPS)
"""Its last step changes nothing."""
TRAILING = Schedule.from_scheduler(sd_scheduler(timestep_spacing="trailing", set_alpha_to_one=True), STEPS)


class FirstCounts(TinyNet):
    """A network whose outputs all have the gradient of the first one."""

    first: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        output = super().forward(x, t, cond, shift)
        if self.first is None:
            self.first = output
        return output.detach() + (self.first - self.first.detach())


def made(solver: Any, schedule: Any = LEADING, network: Any = None, **options: Any) -> Any:
    denoiser = Denoiser((network or TinyNet()).double(), *conditions(), 3.0)
    if solver is Sampler:
        scheduler = diffusers.EulerAncestralDiscreteScheduler()
        schedule = SamplerSteps.from_scheduler(scheduler, STEPS)
    return solver(denoiser, schedule, **options)


@pytest.mark.parametrize("memory", ["checkpoint", "naive"])
@pytest.mark.parametrize("solver", [DDIM, EDICT, BDIA, OBELM, Rex, Sampler])
def test_straight_through_is_the_gradient_of_the_first_call_for_all(solver: Any, memory: str) -> None:
    own = {"scheme": "euler"} if solver is Rex else {}
    reference = made(solver, network=FirstCounts(), memory="naive", **own)
    chain = made(solver, memory=memory, **own)
    x = latents(1, 3, 4, grad=True)[0]
    inputs = [x]
    if solver is Sampler:
        reference.step_noise = chain.step_noise = [z.requires_grad_() for z in chain.draw_noise(x.detach())]
        inputs += chain.step_noise
    whole = pull(chain(x), inputs)
    chain.last_steps = StraightThrough()
    ends, expected = chain(x), reference(x)
    assert all(relative(end, want) < FP64 for end, want in zip(ends, expected, strict=True))
    for found, want in zip(pull(ends, inputs), pull(expected, inputs), strict=True):
        assert want.norm() > 0 and relative(found, want) < FP64
    assert relative(pull(ends, inputs)[0], whole[0]) > 1e-3


@pytest.mark.parametrize("schedule", [LEADING, TRAILING, FLOW], ids=["leading", "trailing", "flow"])
def test_straight_through_of_ddim_is_one_step_over_the_whole_schedule(schedule: Schedule) -> None:
    if schedule.is_flow:
        single = Schedule.flow(schedule.timesteps[:1], [schedule.sigmas[0], schedule.sigmas[-1]])
    else:
        single = Schedule(schedule.timesteps[:1], schedule.alphas_cumprod[:1], schedule.alphas_cumprod_prev[-1:])
    x = latents(1, 3, 4, grad=True)[0]
    chain, one_step = made(DDIM, schedule), made(DDIM, single, memory="naive")
    plain = chain(x)[0]
    chain.last_steps = StraightThrough()
    assert relative(chain(x)[0], plain) < FP64 < relative(one_step(x)[0], plain)
    assert relative(pull(chain(x), [x])[0], pull(one_step(x), [x])[0]) < FP64


@pytest.mark.parametrize("schedule", [LEADING, TRAILING, FLOW], ids=["leading", "trailing", "flow"])
@pytest.mark.parametrize("copies", [1, 3])
def test_low_variance_is_the_papers_formula(schedule: Schedule, copies: int) -> None:
    """The gradient at the latents before the last step, by plain autograd, and its linear way back to the start."""
    x = latents(1, 3, 4, grad=True)[0]
    chain = made(DDIM, schedule)
    plain = chain(x)[0].detach()
    chain.last_steps = LowVariance(copies, seed=4)
    (found,) = pull(chain(x), [x])
    assert relative(chain(x)[0], plain) < FP64

    draws, denoiser = random.Random(4), chain.denoiser
    step = max(number for number, pair in enumerate(pairs(schedule)) if pair[0] != pair[1])
    before, after = pairs(schedule)[step]
    kept = before.signal / after.signal
    points = []
    for _ in range(copies):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(draws.getrandbits(63))).to(x)
        added = (before.noise**2 - (kept * after.noise) ** 2) ** 0.5
        points.append((kept * plain + added * noise).requires_grad_())
    single = last_step(schedule, step)
    denoised = torch.stack([DDIM(denoiser, single, memory="naive")(point)[0] for point in points]).mean(0)
    at_last = torch.stack(pull((denoised,), points)).sum(0)  # type: ignore[arg-type]
    linear = 1.0
    for start, end in pairs(schedule)[:step]:
        linear *= 1.0 if schedule.is_flow else end.signal / start.signal
    assert relative(found, linear * at_last) < FP64


def pairs(schedule: Schedule) -> list[Any]:
    """The noise levels before and after each step."""
    passed = levels(schedule)
    return list(itertools.pairwise(passed))


def last_step(schedule: Schedule, step: int) -> Schedule:
    """The schedule of one step alone."""
    timestep = schedule.timesteps[step : step + 1]
    if schedule.is_flow:
        return Schedule.flow(timestep, schedule.sigmas[step : step + 2])
    return Schedule(
        timestep, *(row[step : step + 1] for row in (schedule.alphas_cumprod, schedule.alphas_cumprod_prev))
    )


@pytest.mark.parametrize("solver", [BDIA, OBELM])
def test_more_copies_vary_less(solver: Any) -> None:
    """Against the mean of many, whose own error is small beside that of one or of eight."""
    x = latents(1, 3, 4, grad=True)[0]
    chain = made(solver, TRAILING)

    def drawn(copies: int, seed: int) -> Tensor:
        chain.last_steps = LowVariance(copies, seed)
        return pull(chain(x), [x])[0]

    mean = drawn(400, 0)
    errors = [sum(relative(drawn(copies, seed), mean) for seed in range(1, 9)) / 8 for copies in (1, 8)]
    assert 0 < errors[1] < 0.6 * errors[0], errors


def test_cost() -> None:
    """One call without a graph for each step, and one with a graph, or one for each copy."""
    network = Counting(TinyNet())
    chain = made(DDIM, TRAILING, network)
    x = latents(1, 3, 4, grad=True)[0]
    for truncation, plain, graphs in ((StraightThrough(), STEPS + 1, 1), (LowVariance(3), STEPS + 3, 3)):
        chain.last_steps = truncation
        network.calls.clear()
        pull(chain(x), [x])
        assert sum(graph for _, graph in network.calls) == graphs
        assert len(network.calls) - graphs == plain


@pytest.mark.parametrize("truncation", [StraightThrough(), LowVariance()])
def test_optimize_and_copies(truncation: Any) -> None:
    chain = made(DDIM, TRAILING)
    chain.last_steps = truncation
    assert repr(pickled(chain).last_steps) == repr(truncation)
    result = doodl_fast.optimize(
        chain, latents(1, 3, 4)[0], lambda z: z, lambda z: z.square().mean(), 3, grad_scale=5, progress=False
    )
    assert result.final_loss < result.losses[0]


def test_what_is_refused() -> None:
    for solver in (EDICT, Rex, Sampler):
        with pytest.raises(ValueError, match=r"LowVariance needs a solver that calls the network once .* use DDIM, BD"):
            made(solver).last_steps = LowVariance()
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match="copies: expected an int of at least 1, got"):
            LowVariance(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last_steps: expected None with arithmetic='exact'"):
        made(BDIA, arithmetic="exact").last_steps = StraightThrough()
    chain = made(DDIM)
    chain.last_steps = LastSteps(1)
    chain.last_steps = None
    assert chain.last_steps is None
