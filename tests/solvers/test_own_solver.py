"""The example of the page on solvers, run as it stands: BDIA on a flow, with all that comes with a chain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import TinyNet, conditions, latents, pull, relative

import doodl_fast
from doodl_fast import BDIA, Denoiser, Schedule

PAGE = Path(__file__).parents[2] / "docs" / "solvers.md"


@pytest.fixture(scope="module")
def leapfrog() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text().split("## Write your own solver")[1], re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), found)
    return found["Leapfrog"]


def made(kind: Any, **options: Any) -> Any:
    schedule = Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 7)
    return kind(Denoiser(TinyNet().double(), *conditions(), 3.0), schedule, **options)


def test_it_is_bdia_of_a_flow(leapfrog: Any) -> None:
    x = latents(1, 3, 4)[0]
    for found, expected in zip(made(leapfrog)(x), made(BDIA, gamma=1.0)(x), strict=True):
        assert relative(found, expected) < 1e-13


def test_gradient_inverse_and_exact_arithmetic_come_with_it(leapfrog: Any) -> None:
    x = latents(1, 3, 4, grad=True)[0]
    expected = pull(made(leapfrog, memory="naive")(x), [x])[0]
    for memory in ("checkpoint", "reversible", 2, "auto"):
        assert relative(pull(made(leapfrog, memory=memory)(x), [x])[0], expected) < 1e-12
    chain = made(leapfrog)
    assert relative(chain.inverse(*chain(x.detach()))[0], x) < 1e-12
    exact = made(leapfrog, arithmetic="exact64")
    start = exact.state(x.detach())
    back = exact.inverse_state(exact.forward_state(start))
    assert all(torch.equal(a, b) for a, b in zip(back.tensors(), start.tensors(), strict=True))
    result = doodl_fast.optimize(chain, x.detach(), lambda z: z, lambda z: z.square().mean(), 3, progress=False)
    assert result.final_loss < result.losses[0]


def test_names_that_a_solver_needs_are_public() -> None:
    for name in ("Coupling", "Program", "DiffusionChain", "Chain", "Schedule", "Denoiser"):
        assert name in doodl_fast.__all__ and getattr(doodl_fast, name)


def test_the_table_of_solvers_names_every_solver() -> None:
    table = PAGE.read_text().split("## Which solver")[1].split("## ")[0]
    for name in ("DDIM", "DPMSolver", "UniPC", "LCM", "Sampler", "EDICT", "BDIA", "OBELM", "Rex", "RexSDE"):
        assert f"`{name}`" in table and name in doodl_fast.__all__
