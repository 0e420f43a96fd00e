"""The gradient of every variable and every loss, against central differences in float64 (`gradients_table.py`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import latents, randn, smooth_pictures
from gradients import check_gradient
from gradients_table import LOSSES, PAGE, VARIABLES, double, page
from torch import Tensor

import doodl_fast
from doodl_fast import guidance

STEP = 1e-5
QUIET: dict[str, Any] = {
    "progress": False,
    "perturbation_scale": 0.0,
    "renormalize_latents": False,
    "clip_grad_value": None,
    "momentum": 0.0,
}


@pytest.mark.parametrize("title", LOSSES)
def test_the_gradient_of_a_loss(title: str, clip: tuple[Any, Any], tmp_path: Path) -> None:
    row = LOSSES[title]
    loss = row.make(double(clip), tmp_path)
    if row.of == "pictures":

        def value(images: Tensor) -> Tensor:
            torch.manual_seed(0)  # of cutouts
            return loss(images)

        check_gradient(value, smooth_pictures(2, 40, 36).clamp(-0.95, 0.95), rel=row.rel)
    else:
        noise = 1.3 * randn(2, 3, 6, 6) + 0.7 * randn(2, 3, 6, 6).roll(1, -1) + 0.4
        check_gradient(lambda start: loss(None, start=start), noise, rel=row.rel)


def score(images: Tensor) -> Tensor:
    """Depends on every pixel of a picture in another way."""
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype, device=images.device)
    return (images.sin() * weights.view_as(images)).mean()


@pytest.mark.parametrize(("title", "memory"), [(name, mode) for name, row in VARIABLES.items() for mode in row.modes])
def test_the_gradient_of_a_variable(title: str, memory: str, tmp_path: Path) -> None:
    row = VARIABLES[title]
    chain = row.make(memory, tmp_path)
    start = latents(*row.shape)[0]
    if row.name == "noise":
        chain.step_noise = chain.draw_noise(start, seed=3)

    def run(tensors: list[Tensor] | None = None) -> tuple[float, list[Tensor], list[Tensor]]:
        """The loss, the tensors of the variable, and by how much a step of gradient descent lowers them."""
        first, given = start, {} if tensors is None else {"value": tensors}
        options: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=1.0)}
        if row.name != "start":
            options["variables"] = {row.name: {"renormalize": False, **given}}
        elif tensors is not None:
            (first,) = tensors
        seen: list[Any] = []
        result = doodl_fast.optimize(chain, first, None, score, 1, callback_on_step_end=seen.append, **options, **QUIET)
        before = [first] if row.name == "start" else list(seen[0].variables[row.name])
        after = list(result.latents)[:1] if row.name == "start" else list(result.variables[row.name])
        return result.losses[0], before, [old - new for old, new in zip(before, after, strict=True)]

    _, values, gradients = run()
    if row.name == "start":  # the members of a pair share the gradient
        gradients = [chain.num_pictures * gradients[0]]
    norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    assert norm > 1e-6
    for seed in range(3):
        directions = [randn(*value.shape, seed=seed + 7 * n).to(value) for n, value in enumerate(values)]
        length = sum(float(direction.square().sum()) for direction in directions) ** 0.5
        ends = []
        for sign in (STEP, -STEP):
            moved = [value + sign / length * way for value, way in zip(values, directions, strict=True)]
            ends.append(run(moved)[0])
        slope = (ends[0] - ends[1]) / (2 * STEP)
        found = sum(float((g * way).sum()) for g, way in zip(gradients, directions, strict=True)) / length
        assert found == pytest.approx(slope, rel=row.rel, abs=1e-7 * norm)


def test_the_page_of_the_documentation_is_the_table() -> None:
    assert PAGE.read_text() == page(), "write it with `python tests/gradients_table.py`"


def test_every_loss_has_a_row() -> None:
    classes = {name for name in guidance.__all__ if isinstance(getattr(guidance, name), type)}
    assert {row.name for row in LOSSES.values()} == classes
