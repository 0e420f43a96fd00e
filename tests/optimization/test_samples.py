"""A batch of independent optimisations has the results of single runs, and the best of many starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, TinyNet, latents, randn, relative, sd_scheduler
from torch import Tensor

import doodl_fast
from doodl_fast import DDIM, EDICT, Denoiser, Sampler, SamplerSteps, Schedule
from doodl_fast.optimization import Each, search

BATCH = 3
START = latents(BATCH, 3, 4, 4)[0]
TARGETS = randn(BATCH, 3, 4, 4, seed=8).to(DEVICE)
COND, UNCOND = randn(BATCH, 5, 4, seed=4).to(DEVICE), randn(1, 5, 4, seed=5).to(DEVICE)


def chain(kind: str = "edict", sample: int | None = None) -> Any:
    """A chain with a prompt for each sample, or that of one sample alone."""
    cond = COND if sample is None else COND[sample : sample + 1]
    denoiser = Denoiser(TinyNet().double(), cond, UNCOND, 3.0, vjp_dtype=None)
    if kind == "sampler":
        from diffusers import DDPMScheduler

        return Sampler(denoiser, SamplerSteps.from_scheduler(DDPMScheduler(clip_sample=False), 4))
    solver = EDICT if kind == "edict" else DDIM
    made = solver(denoiser, Schedule.from_scheduler(sd_scheduler(), 4))
    made.prompts = [f"prompt {n}" for n in range(BATCH)] if sample is None else [f"prompt {sample}"]
    return made


class Near:
    """The mean squared distance to a reference picture."""

    def __init__(self, number: int) -> None:
        self.target = TARGETS[number : number + 1]

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.target).square().mean()


def by_prompt(images: Tensor, prompts: list[str], start: Tensor) -> Tensor:
    """Depends on the sample's prompt and on its start."""
    (prompt,) = prompts
    assert len(images) == len(start) == 1
    return Near(int(prompt[-1]))(images) + 0.1 * start.square().mean()


def optimize(made: Any, start: Tensor, loss: Any, **options: Any) -> doodl_fast.Result:
    settings = {"num_optimization_steps": 8, "grad_scale": 30.0, "clip_grad_value": 0.3, "perturbation_scale": 1e-2}
    return doodl_fast.optimize(made, start, None, loss, progress=False, **{**settings, **options})


CASES: dict[str, Any] = {
    "plain": {},
    "untied": {"tied_latents": False, "first_image_only": True},
    "adam": {"optimizer": lambda p: torch.optim.Adam(p, lr=0.1)},
    "schedule": {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8)},
    "patience": {"patience": 1, "momentum": 0.0, "grad_scale": 300.0, "clip_grad_value": 3.0},
    "variables": {"variables": {"start": {}, "prompt_embeds": {"lr": 0.05}, "guidance_scale": {"lr": 0.2}}},
    "many starts": {"best_of": 4},
}


def same(one: doodl_fast.Result, other: doodl_fast.Result) -> None:
    """Whether two results agree in everything, up to rounding in float64."""
    assert one.best_step == other.best_step and len(one.losses) == len(other.losses)
    for name in ("losses", "final_loss", "best_loss", "pair_losses", "history"):
        got, expected = getattr(one, name), getattr(other, name)
        if name == "history":
            got, expected = list(got.values()), list(expected.values())
        assert torch.allclose(
            torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        ), name
    for name in ("latents", "images", "best_latents", "best_images"):
        for got, expected in zip(getattr(one, name), getattr(other, name), strict=True):
            assert relative(got, expected) < 1e-12, name
    for name, tensors in other.variables.items():
        for ours, theirs in ((one.variables, tensors), (one.best_variables, other.best_variables[name])):
            assert all(relative(got, want) < 1e-12 for got, want in zip(ours[name], theirs, strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["edict", "ddim"])
def test_a_batch_has_the_results_of_single_runs(kind: str, case: str) -> None:
    if kind == "ddim" and case == "untied":
        pytest.skip("it starts from one latent")
    options = CASES[case]
    batch = optimize(chain(kind), START, by_prompt, per_sample=True, **options)
    ends = set()
    for sample in range(BATCH):
        alone = optimize(chain(kind, sample), START[sample : sample + 1], by_prompt, **options)
        same(batch.samples[sample], alone)
        ends.add(len(alone.losses))
    if case == "patience":
        assert len(ends) > 1, "the samples are meant to end at different steps"
    for sample, result in enumerate(batch.samples):
        assert relative(batch.latents[0][sample : sample + 1], result.latents[0]) < 1e-15
        assert relative(batch.best_images[0][sample : sample + 1], result.best_images[0]) < 1e-15
    assert batch.best_loss == pytest.approx(sum(r.best_loss for r in batch.samples) / BATCH)


def test_the_noise_of_every_step_for_every_sample() -> None:
    noise = chain("sampler").draw_noise(START, seed=9)
    options: dict[str, Any] = {"variables": {"noise": {"lr": 0.1}}, "scheduler": None}
    made = chain("sampler")
    made.step_noise = noise
    batch = optimize(made, START, Each([Near(n) for n in range(BATCH)]), per_sample=True, **options)
    for sample in range(BATCH):
        one = chain("sampler", sample)
        one.step_noise = [z[sample : sample + 1] for z in noise]
        same(batch.samples[sample], optimize(one, START[sample : sample + 1], Near(sample), **options))


def test_a_loss_may_name_the_sample() -> None:
    def loss(images: Tensor, sample: int) -> Tensor:
        return Near(sample)(images)

    each = optimize(chain(), START, Each([Near(n) for n in range(BATCH)]), per_sample=True)
    named = optimize(chain(), START, loss, per_sample=True)
    assert torch.equal(each.latents[0], named.latents[0])


@pytest.mark.parametrize("case", ["patience", "variables"])
def test_it_is_resumed_to_the_bit(case: str, tmp_path: Any) -> None:
    options = {**CASES[case], "per_sample": True}
    whole = optimize(chain(), START, by_prompt, **options)
    optimize(chain(), START, by_prompt, **options, folder=tmp_path, num_optimization_steps=3)
    resumed = optimize(chain(), START, by_prompt, **options, resume=tmp_path)
    assert torch.equal(resumed.latents[0], whole.latents[0])
    for ours, theirs in zip(resumed.samples, whole.samples, strict=True):
        assert ours.losses == theirs.losses and ours.best_step == theirs.best_step
        assert torch.equal(ours.best_latents[0], theirs.best_latents[0])


def test_a_run_ends_when_nothing_gets_better() -> None:
    """It ends before an update, at the first step that is `patience` steps after the best one."""
    options = CASES["patience"]
    free = optimize(chain(), START, Near(0), **{**options, "patience": None}, num_optimization_steps=12)
    losses = free.losses
    expected = next(n for n in range(1, 12) if losses[n] >= min(losses[:n]))
    result = optimize(chain(), START, Near(0), **options, num_optimization_steps=12)
    assert result.losses == losses[: expected + 1] and result.final_loss == losses[expected]
    impatient = optimize(chain(), START, Near(0), **options, min_delta=100.0)
    assert len(impatient.losses) == 2


def test_the_best_of_many_starts() -> None:
    """The search scores what a run from that start begins with, and a run begins from what the search finds."""
    found = search(chain("ddim"), START, None, Near(0), best_of=6)
    assert len(found.losses) == 6 and found.loss == min(found.losses) == found.losses[found.best]
    assert found.best > 0, "the first start is meant not to be the best"
    first = optimize(chain("ddim"), found.latents[0], Near(0), num_optimization_steps=1)
    assert first.losses[0] == pytest.approx(found.loss, rel=1e-12)
    assert optimize(chain("ddim"), START, Near(0), best_of=6, num_optimization_steps=1).losses == first.losses
    norm = START.flatten(1).norm(dim=1)
    assert torch.allclose(found.latents[0].flatten(1).norm(dim=1), norm)
    each = search(chain("ddim"), START, None, by_prompt, best_of=6, per_sample=True)
    assert each.loss == pytest.approx(sum(min(column) for column in zip(*each.losses, strict=True)) / BATCH)
    assert len(set(each.best)) > 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, ValueError, "per_sample: expected optimizers that .*, got LBFGS"),
        (
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
            ValueError,
            "per_sample: .* got SGD with ReduceLROnPlateau",
        ),
        ({"loss": Each([Near(0)])}, ValueError, "losses: expected one for each of the 3 samples, got 1"),
        ({"decode": lambda z: z[:1]}, ValueError, "decode: expected 3 images of 3 latents with per_sample=True, got 1"),
        (
            {"loss": lambda images, sample: images.mean() / (0.0 if sample == 2 else 1.0)},
            FloatingPointError,
            "loss: expected a finite value, got -?inf at optimisation step 0 for sample 2",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"decode": None, "loss": Near(0), "num_optimization_steps": 2, **options}
    with pytest.raises(error, match=message):
        doodl_fast.optimize(chain(), START, progress=False, per_sample=True, **arguments)


def test_a_list_of_losses_for_each() -> None:
    with pytest.raises(TypeError, match="losses: expected a list of functions, one for each sample, got 3"):
        Each(3)  # type: ignore[arg-type]
