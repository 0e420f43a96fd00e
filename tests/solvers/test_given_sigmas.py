"""The noise levels that a caller gives, `sigmas` and `mu`, are those of the family's own pipeline."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from conftest import relative
from families_table import CASES, STEPS

from doodl_fast.diffusion.families import family_of
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.sampler import Sampler

pytestmark = pytest.mark.filterwarnings("ignore")
SIGMAS = [0.9, 0.35]


def compare(pipe: Any, name: str, solver: Any, **given: Any) -> None:
    """Compares a chain's pictures with the pipeline's, and checks that the arguments matter."""
    case = CASES[name]
    made = []
    for options in (given, {}):
        chain = solver.from_pipeline(pipe, num_inference_steps=STEPS, memory="checkpoint", **case.call, **options)
        x = chain.noise(generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            made.append((chain.decode(chain(x)[0]) / 2 + 0.5).clamp(0, 1))
    generator = torch.Generator().manual_seed(3)
    call = {**case.call, **case.pipeline_only, **given, "generator": generator, "output_type": "pt"}
    expected = pipe(num_inference_steps=STEPS, **call)[0]
    assert relative(made[0], expected) < 1e-5 and relative(made[1], expected) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_sigmas(name: str, tmp_path: Path) -> None:
    pipe = CASES[name].make(tmp_path)
    takes_them = "sigmas" in inspect.signature(type(pipe).__call__).parameters
    if takes_them and family_of(pipe).takes_flows:
        for solver in (DDIM, Sampler):
            compare(pipe, name, solver, sigmas=SIGMAS)
        return
    # Schedulers of diffusion have timesteps of their own, and some pipelines of flows take no sigmas.
    with pytest.raises(
        (TypeError, ValueError), match=r"^sigmas: (from_pipeline has no such argument|expected None bec)"
    ):
        DDIM.from_pipeline(pipe, num_inference_steps=STEPS, **CASES[name].call, sigmas=SIGMAS)


@pytest.mark.parametrize("solver", [DDIM, Sampler])
def test_mu_of_stable_diffusion_3(solver: Any, tmp_path: Path) -> None:
    pipe = tiny_families.stable_diffusion_3(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    compare(pipe, "Stable Diffusion 3", solver, mu=3.0)
    compare(pipe, "Stable Diffusion 3", solver, mu=3.0, sigmas=SIGMAS)
