"""What keeps noise noise: regularisers of all steps' noise, and projections after updates. Also, who made a NaN."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import latents, relative
from test_variables import CHAINS, QUIET, SGD, START, denoiser, loss, sde
from torch import Tensor

import doodl_fast
from doodl_fast.guidance import AllNoise, NoiseNorm, NoiseProbability, StartDistance, Whiteness, white_projection


@pytest.mark.parametrize("make", [sde, lambda: CHAINS["Sampler"](denoiser(), "checkpoint")], ids=["RexSDE", "Sampler"])
@pytest.mark.parametrize(
    "regulariser", [NoiseNorm(), Whiteness(2), NoiseProbability(4, 2)], ids=lambda r: type(r).__name__
)
def test_the_gradient_of_a_regulariser_of_all_noise(make: Any, regulariser: Any) -> None:
    """Of a step of SGD with rate 1, against autograd of each noise by itself."""
    chain = make()
    start = 1.5 * START + 0.3
    chain.step_noise = [1.5 * z + 0.3 for z in chain.draw_noise(start, seed=5)]
    result = doodl_fast.optimize(
        chain,
        start,
        None,
        {"nothing": lambda latents: 0 * latents.sum(), "noise": (AllNoise(regulariser), 2.0)},
        optimizer=partial(torch.optim.SGD, lr=1.0),
        clip_grad_value=None,
        variables={"start": {}, "noise": {"renormalize": False}},
        **QUIET,
    )
    found = [2 * (start - result.latents[0])]  # a pair of equal latents shares the gradient
    found += [old - new for old, new in zip(chain.step_noise, result.variables["noise"], strict=True)]
    value = torch.zeros((), dtype=torch.float64)
    for got, tensor in zip(found, [start, *chain.step_noise], strict=True):
        leaf = tensor.clone().requires_grad_()
        part = 2 * regulariser(None, start=leaf)
        value += part.detach() / 2
        (expected,) = torch.autograd.grad(part, leaf)
        assert relative(got, expected) < 1e-10 and float(expected.norm()) > 1e-3
    assert result.history["noise"][0] == pytest.approx(float(value), rel=1e-10)


def test_a_reference_for_each_noise() -> None:
    noise = [latents(2, 3, 4, 4, seed=seed)[0] for seed in range(3)]
    references = [z + 0.1 * (number + 1) for number, z in enumerate(noise)]
    value = AllNoise([StartDistance(z) for z in references])(None, start=noise[0], noise=noise[1:])
    assert float(value) == pytest.approx(24 * (0.01 + 0.04 + 0.09), rel=1e-10)
    with pytest.raises(ValueError, match="regulariser: expected one, or 3, for the start and each of the steps"):
        AllNoise([NoiseNorm(), NoiseNorm()])(None, start=noise[0], noise=noise[1:])
    with pytest.raises(TypeError, match="regulariser: expected a loss that names start, or a list of them, got 3"):
        AllNoise(3)
    chain = CHAINS["DDIM"](denoiser(), "checkpoint")
    with pytest.raises(ValueError, match="'noise' cannot be given: the chain has no noise of its steps"):
        doodl_fast.optimize(chain, START, None, [loss, AllNoise(NoiseNorm())], **QUIET)


@pytest.mark.parametrize("optimizer", [None, partial(torch.optim.Adam, lr=0.1), partial(torch.optim.LBFGS, lr=0.1)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_start_is_projected_after_every_update(optimizer: Any, tied: bool) -> None:
    """A step with a projection is a step without it, and the projection of what it gives."""
    project = partial(white_projection, rings=2)
    options: dict[str, Any] = {**QUIET, "optimizer": optimizer, "clip_grad_value": None, "tied_latents": tied}
    chain = CHAINS["EDICT"](denoiser(), "checkpoint")
    plain = doodl_fast.optimize(chain, START, None, loss, **options)
    result = doodl_fast.optimize(chain, START, None, loss, variables={"start": {"project": project}}, **options)
    for got, free in zip(result.latents, plain.latents, strict=True):
        assert relative(got, project(free)) < 1e-12
        assert float((got - free).norm()) > 1e-2
    two = doodl_fast.optimize(
        chain, START, None, loss, variables={"start": {"project": project}}, **{**options, "num_optimization_steps": 2}
    )
    assert relative(two.latents[0], project(two.latents[0])) < 1e-12


def test_the_noise_of_all_steps_is_projected() -> None:
    chain = CHAINS["Sampler"](denoiser(), "checkpoint")
    chain.step_noise = chain.draw_noise(START, seed=5)
    plain = {**SGD, "renormalize": False}
    made = [
        doodl_fast.optimize(chain, START, None, loss, variables={"noise": {**plain, **more}}, **QUIET)
        for more in ({}, {"project": white_projection})
    ]
    for free, got in zip(made[0].variables["noise"], made[1].variables["noise"], strict=True):
        assert relative(got, white_projection(free)) < 1e-12 and float((got - free).norm()) > 1e-2


def test_samples_are_projected_alone() -> None:
    """A batch of independent optimisations has the results of single runs."""
    chain = CHAINS["DDIM"](denoiser(), "checkpoint")
    options: dict[str, Any] = {
        **QUIET,
        "num_optimization_steps": 2,
        "variables": {"start": {"project": white_projection}},
    }

    def one(images: Tensor) -> Tensor:
        return images.sin().sum()

    both = doodl_fast.optimize(chain, START, None, one, per_sample=True, **options)
    for number in range(2):
        alone = doodl_fast.optimize(chain, START[number : number + 1], None, one, **options)
        assert relative(both.latents[0][number : number + 1], alone.latents[0]) < 1e-12


def test_a_resumed_run_needs_the_same_projection(tmp_path: Path) -> None:
    chain = CHAINS["DDIM"](denoiser(), "checkpoint")

    def run(project: Any, folder: Path | None, steps: int, resume: bool = False) -> Any:
        variables = {"start": {} if project is None else {"project": project}}
        options = {**QUIET, "num_optimization_steps": steps}
        return doodl_fast.optimize(
            chain, START, None, loss, variables=variables, folder=folder, resume=resume, **options
        )

    run(white_projection, tmp_path, 1)
    with pytest.raises(ValueError, match=r"resume: .* had options="):
        run(None, tmp_path, 2, resume=True)
    assert torch.equal(run(white_projection, tmp_path, 2, True).latents[0], run(white_projection, None, 2).latents[0])


@pytest.mark.parametrize(
    ("project", "error", "match"),
    [
        (3, TypeError, r"variables\['start'\]: expected a function from a tensor to a tensor for project, got 3"),
        (lambda z: None, TypeError, r"variables\['start'\]: expected project to return a tensor, got NoneType"),
        (
            lambda z: z[:1],
            ValueError,
            r"variables\['start'\]: expected project to return the shape \(2, 3, 4, 4\), got",
        ),
        (lambda z: z / 0, FloatingPointError, "the updated latents hold NaN or Inf"),
    ],
)
def test_bad_projections(project: Any, error: type[Exception], match: str) -> None:
    chain = CHAINS["DDIM"](denoiser(), "checkpoint")
    with pytest.raises(error, match=match):
        doodl_fast.optimize(chain, START, None, loss, variables={"start": {"project": project}}, **QUIET)


# who made a NaN


def without_slope(images: Tensor) -> Tensor:
    """A finite value with an infinite slope."""
    return (images.flatten()[0] * 0).sqrt()


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_loss_whose_gradient_is_not_finite_is_named(per_sample: bool) -> None:
    chain = CHAINS["EDICT"](denoiser(), "checkpoint")
    losses = {"fine": lambda images: images.mean(), "bad": (without_slope, 0.5), "norm": NoiseNorm()}
    with pytest.raises(
        FloatingPointError, match="NaN or Inf at optimisation step 0 in that of loss 'bad', whose value"
    ):
        doodl_fast.optimize(chain, START, None, losses, per_sample=per_sample, **QUIET)
    on_start = {"fine": lambda images: images.mean(), "start": lambda start: without_slope(start)}
    with pytest.raises(FloatingPointError, match="in that of loss 'start', whose value is finite"):
        doodl_fast.optimize(chain, START, None, on_start, per_sample=per_sample, **QUIET)
    with pytest.raises(
        FloatingPointError, match=r"in that of loss 'a' and loss 'b', whose value is finite; .* decoder"
    ):
        doodl_fast.optimize(
            chain,
            START,
            lambda z: z + without_slope(z),
            {"a": loss, "b": without_slope},
            per_sample=per_sample,
            **QUIET,
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_whose_value_is_not_finite_is_named(value: float) -> None:
    chain = CHAINS["EDICT"](denoiser(), "checkpoint")
    losses = {"fine": loss, "bad": (lambda images: images.mean() * 0 + value, 0.5)}
    with pytest.raises(FloatingPointError, match=r"loss 'bad': expected a finite value, got .* at optimisation step 0"):
        doodl_fast.optimize(chain, START, None, losses, **QUIET)
