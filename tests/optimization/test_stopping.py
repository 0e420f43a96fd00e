"""A callback that ends a run leaves the result, and the stored state, at the latents that it saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_optimize import optimize, problem

import doodl_fast
from doodl_fast.optimization import checkpoint


@pytest.mark.parametrize("last", [0, 2])
def test_the_result_is_what_the_callback_saw(last: int, tmp_path: Path) -> None:
    seen: list[doodl_fast.StepInfo] = []

    def stop(info: doodl_fast.StepInfo) -> bool:
        seen.append(info)
        return info.step == last

    result = optimize(callback_on_step_end=stop, folder=tmp_path, num_optimization_steps=5)
    info = seen[-1]
    assert len(seen) == len(result.losses) == last + 1
    for ours, theirs in zip((*result.latents, *result.images), (*info.latents, *info.images), strict=True):
        assert torch.equal(ours, theirs)
    assert result.final_loss == info.loss == result.losses[-1]
    assert result.best_loss == min(result.losses) == result.losses[result.best_step]
    stored = checkpoint.load(tmp_path)
    assert stored["step"] == last and len(stored["pair_losses"]) == last
    assert torch.equal(stored["update"]["latents"][0], info.latents[0].cpu())


@pytest.mark.parametrize("last", [0, 2])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(last: int, tmp_path: Path) -> None:
    whole = optimize(num_optimization_steps=5)
    optimize(callback_on_step_end=lambda info: info.step == last, folder=tmp_path, num_optimization_steps=5)
    torch.manual_seed(77)
    arguments = {**problem(), "grad_scale": 5.0, "clip_grad_value": 0.05}
    resumed = doodl_fast.optimize(**arguments, num_optimization_steps=5, resume=tmp_path)
    assert resumed.losses == whole.losses and torch.equal(resumed.latents[0], whole.latents[0])


def test_the_best_images_are_those_of_an_earlier_step() -> None:
    """The steps overshoot, so that the run ends at a higher loss than it had before."""
    images: list[torch.Tensor] = []

    def stop(info: doodl_fast.StepInfo) -> bool:
        images.append(info.images[0])
        return info.step == 5

    def loss(image: torch.Tensor) -> torch.Tensor:
        return (image.square().mean() - 2).square()

    result = optimize(
        loss=loss,
        callback_on_step_end=stop,
        grad_scale=200.0,
        clip_grad_value=1.5,
        renormalize_latents=False,
        num_optimization_steps=8,
    )
    assert result.best_step < 5
    assert torch.equal(result.best_images[0], images[result.best_step])
    assert not torch.equal(result.images[0], result.best_images[0])
