"""Pictures that no chain has made are inverted from a guess of the step before, which makes edits more accurate."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from conftest import Counting, TinyNet, conditions, latents, pull, relative, sd_scheduler
from gaussian_mixture import DEVIATION, MEANS, exact_solution, ideal_eps
from test_orders import ALPHAS, FIRST, LAST, level_at, model, schedule
from tolerances import FP64, FP64_UNDONE
from torch import Tensor

from doodl_fast import BDIA, DDIM, OBELM, Denoiser, Rex, Schedule
from doodl_fast.solvers.step_back import step_back

SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "BDIA": (BDIA, {}),
    "BDIA, gamma 0.9": (BDIA, {"gamma": 0.9}),
    "O-BELM": (OBELM, {}),
}
TRAILING = Schedule.from_scheduler(sd_scheduler(timestep_spacing="trailing", set_alpha_to_one=True), 4)
"""It ends without noise."""
LEADING = Schedule.from_scheduler(sd_scheduler(), 4)
"""Its last step changes nothing."""
FLOW = Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 4)


def mirrored() -> Denoiser:
    """The ideal network of the mirrored mixture, in the place of that of another prompt."""
    return Denoiser(lambda x, t, cond: -ideal_eps(-x, *level_at(float(t))), None)


@pytest.mark.parametrize("name", SOLVERS)
def test_edits_are_more_accurate_than_from_a_copy_of_the_picture(name: str) -> None:
    """Against the exact solution to the noise of one mixture and from there to the picture of another one."""
    ends = [(math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])) for t in (FIRST, LAST)]
    draws = torch.Generator().manual_seed(0)
    means = torch.tensor(MEANS, dtype=torch.float64)[torch.arange(60) % 3]
    picture = means + DEVIATION * torch.randn(60, generator=draws, dtype=torch.float64)
    x = (ends[1][0] * picture + ends[1][1] * torch.randn(60, generator=draws, dtype=torch.float64))[None]
    truth = -exact_solution(-exact_solution(x, ends[1], ends[0]), *ends)
    solver, options = SOLVERS[name]
    there, back = (solver(network, schedule(20), **options) for network in (model(), mirrored()))

    def error(*start: Tensor) -> float:
        return relative(back(*there.inverse(*start))[0], truth)

    assert error(x) < 0.3 * error(x, x)


@pytest.mark.parametrize("given", [TRAILING, LEADING, FLOW], ids=["trailing", "leading", "flow"])
def test_it_is_ddims_last_step_undone(given: Schedule) -> None:
    """With a network that depends on the conditions alone it is exact."""
    x = latents(1, 3, 4)[0]

    def network(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return torch.sin(cond.mean() + t / 500) * torch.ones_like(x)

    denoiser = Denoiser(network, conditions()[0])
    last = max(number for number, pair in enumerate(steps_of(given)) if pair[0] != pair[1])
    if given.is_flow:
        single = Schedule.flow(given.timesteps[last:], given.sigmas[last:])
    else:
        part = slice(last, last + 1)
        single = Schedule(given.timesteps[part], given.alphas_cumprod[part], given.alphas_cumprod_prev[part])
    (end,) = DDIM(denoiser, single)(x)
    assert relative(step_back(denoiser, given, end), x) < FP64 < relative(end, x)


def steps_of(given: Schedule) -> list[tuple[float, float]]:
    if given.is_flow:
        return list(zip(given.sigmas, given.sigmas[1:], strict=False))
    return list(zip(given.alphas_cumprod, given.alphas_cumprod_prev, strict=True))


@pytest.mark.parametrize("solver", [BDIA, OBELM, Rex])
@pytest.mark.parametrize("given", [TRAILING, LEADING, FLOW], ids=["trailing", "leading", "flow"])
def test_the_guess_is_part_of_the_way_and_of_its_gradient(solver: Any, given: Schedule) -> None:
    x = latents(1, 3, 4, grad=True)[0]
    network = Counting(TinyNet().double())
    denoiser = Denoiser(network, *conditions(), 3.0)
    chain = solver(denoiser, given)
    guesses = not (solver is Rex and given is LEADING)  # Rex's pair is at one level there, so the guess is x itself.
    before = step_back(denoiser, given, x.detach()) if guesses else x.detach()
    network.calls.clear()
    noise = chain.inverse(x)
    assert len(network.calls) == chain.num_network_calls + guesses
    assert all(torch.equal(a, b) for a, b in zip(noise, chain.inverse(x.detach(), before), strict=True))
    found = chain(*noise)
    assert relative(found[0], x) < FP64_UNDONE
    naive = solver(Denoiser(TinyNet().double(), *conditions(), 3.0), given, memory="naive")
    second = step_back(naive.denoiser, given, x) if guesses else x
    expected = pull(naive.inverse(x, second), [x])[0]
    assert relative(pull(noise, [x])[0], expected) < FP64
    exact = solver(denoiser, given, arithmetic="exact64")
    state = exact.state(x.detach(), end="image")
    assert exact.forward_state(exact.inverse_state(state)).equals(state)
    assert all(relative(a, b) < 1e-6 for a, b in zip(state.latents(), ordered(exact, x.detach(), before), strict=True))


def ordered(chain: Any, picture: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The two latents as the program numbers them."""
    return (other, picture) if chain.picture_index else (picture, other)


def test_where_the_step_does_not_tell_the_picture_itself_is_the_guess() -> None:
    zero_noise = Schedule.from_scheduler(
        sd_scheduler(timestep_spacing="trailing", set_alpha_to_one=True, prediction_type="sample"), 4
    )
    x = latents(1, 3, 4)[0]
    denoiser = Denoiser(TinyNet().double(), *conditions(), 3.0)
    assert step_back(denoiser, zero_noise, x) is x
    assert step_back(denoiser, Schedule((5,), (0.5,), (0.5,)), x) is x
