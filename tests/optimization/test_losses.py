"""Losses that are given what their parameters name, several losses with weights, and losses on latents."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from conftest import latents, relative, tiny_chain
from test_optimize import problem
from torch import Tensor, nn

import doodl_fast
from doodl_fast.optimization.losses import Losses, signature_of

START = latents(2, 3, 4, 4)[0]


def decode(z: Tensor) -> Tensor:
    return 2 * z


def run(loss: Any, **changes: Any) -> doodl_fast.Result:
    """One step by the gradient itself: the update is -0.5 grad_scale (d/dx + d/dy) / 2 of the summed losses."""
    settings = {
        "num_optimization_steps": 1,
        "momentum": 0.0,
        "clip_grad_value": None,
        "renormalize_latents": False,
        "perturbation_scale": 0.0,
        "progress": False,
    }
    return doodl_fast.optimize(tiny_chain(), START, **{"decode": decode, "loss": loss, **settings, **changes})


def moved(result: doodl_fast.Result) -> Tensor:
    """The gradient of the sum of both members' losses, from the step that was taken."""
    return 4 * (START - result.latents[0])


def naive(loss: Any) -> Tensor:
    """The same by plain autograd; loss(images, latents, start) -> scalar."""
    start = START.clone().requires_grad_()
    x = start * 1
    total = sum(loss(decode(end), end, x) for end in tiny_chain(memory="naive")(x, x))
    return torch.autograd.grad(total, start)[0]


def on_images(images: Tensor) -> Tensor:
    return images.square().mean()


def test_a_loss_is_given_what_it_names() -> None:
    """The gradient through the final latents and that of the start itself add up to plain autograd's."""

    def loss(images: Tensor, latents: Tensor, start: Tensor) -> Tensor:
        return images.square().mean() + latents.sin().mean() + (start * latents).mean() + 3 * start.square().mean()

    def keywords(images: Tensor, *, start: Tensor, latents: Tensor, unused: int = 3) -> Tensor:
        return loss(images, latents, start)

    expected = naive(loss)
    for given in (loss, keywords, functools.partial(keywords, unused=2)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert relative(moved(run(given)), expected) < 1e-12


def test_a_regulariser_of_the_start_alone() -> None:
    result = run([on_images, lambda start: start.square().mean()])
    expected = naive(lambda images, latents, start: on_images(images) + start.square().mean())
    assert relative(moved(result), expected) < 1e-12


def test_without_a_decoder_the_loss_gets_the_latents() -> None:
    result = run(on_images, decode=None)
    assert relative(moved(result), naive(lambda images, latents, start: on_images(latents))) < 1e-12
    assert torch.equal(result.images[0], tiny_chain()(*result.latents)[0])


def test_weights_and_the_history() -> None:
    terms = {"clip": on_images, "small": (lambda start: start.abs().mean(), 0.25), "wide": (3.0, on_images)}
    seen: list[doodl_fast.StepInfo] = []
    result = run(terms, num_optimization_steps=2, callback_on_step_end=seen.append)
    assert list(result.history) == ["clip", "small", "wide"]
    for step in range(2):
        values = {name: result.history[name][step] for name in terms}
        assert result.losses[step] == pytest.approx(values["clip"] + 0.25 * values["small"] + 3 * values["wide"])
        assert seen[step].terms == pytest.approx(values)
    assert result.history["small"][0] == pytest.approx(float(START.abs().mean()))
    expected = naive(lambda images, latents, start: 4 * on_images(images) + 0.25 * start.abs().mean())
    assert relative(moved(run(terms)), expected) < 1e-12


def test_a_list_has_the_names_of_its_functions() -> None:
    assert list(run([on_images, on_images, (on_images, 2)]).history) == ["on_images", "on_images_2", "on_images_3"]
    assert run(on_images).history == {"on_images": run(on_images).losses}


def test_prompts_are_the_chains() -> None:
    def loss(images: Tensor, prompts: list[str]) -> Tensor:
        assert prompts == ["a", "b"]
        return images.square().mean()

    chain = tiny_chain()
    with pytest.raises(ValueError, match="loss: its parameter 'prompts' cannot be given: the chain has no texts"):
        run(loss)
    chain.prompts = ["a", "b"]
    doodl_fast.optimize(chain, START, decode, loss, 1, progress=False)
    chain.prompts = ["a", "b", "c"]
    with pytest.raises(ValueError, match="latents: expected 3 rows, one for each prompt"):
        doodl_fast.optimize(chain, START, decode, loss, 1, progress=False)


def test_signatures() -> None:
    known = frozenset({"latents", "start"})

    class Module(nn.Module):
        def forward(self, picture: Tensor, start: Tensor) -> Tensor:
            return picture.mean()

    assert signature_of(lambda *images: 0, known) == (True, ())
    assert signature_of(lambda images, **rest: 0, known) == (True, ())
    assert signature_of(lambda latents: 0, known) == (False, ("latents",))
    assert signature_of(lambda latents, /: 0, known) == (True, ())
    assert signature_of(Module(), known) == (True, ("start",))
    assert signature_of(torch.mean, known) == (True, ())


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ([], ValueError, "loss: expected at least one loss, got none"),
        ([3], TypeError, r"loss \[0\]: expected a function, or a pair \(function, weight\), got int"),
        ({"a": (on_images, float("nan"))}, ValueError, "loss 'a': expected a finite number as its weight, got nan"),
        (lambda images, mask: 0, TypeError, "loss: its parameter 'mask' has no default, and is none of images"),
        ({"a": lambda images, noise: 0}, ValueError, "loss 'a': its parameter 'noise' cannot be given: the chain has"),
        (lambda images, sample: 0, ValueError, "parameter 'sample' cannot be given: only per_sample=True"),
        ([on_images, lambda images: images], ValueError, "loss '<lambda>': expected a differentiable scalar tensor"),
        (lambda images: images.detach().mean(), ValueError, "loss: expected a differentiable scalar, got one without"),
        (lambda images: images.mean() * float("nan"), FloatingPointError, "loss: expected a finite value, got nan"),
        (
            {"a": on_images, "b": lambda images: images.mean() / 0},
            FloatingPointError,
            "loss 'b': expected a finite value, got -?inf at optimisation step 0",
        ),
    ],
)
def test_what_is_refused(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(loss)


def test_losses_are_compared_when_a_run_is_resumed(tmp_path: Any) -> None:
    arguments = {**problem(), "loss": {"a": on_images, "b": (on_images, 2.0)}, "folder": tmp_path}
    doodl_fast.optimize(**arguments, num_optimization_steps=2)
    whole = doodl_fast.optimize(**{**arguments, "folder": None}, num_optimization_steps=4)
    resumed = doodl_fast.optimize(**arguments, num_optimization_steps=4, resume=True)
    assert torch.equal(resumed.latents[0], whole.latents[0]) and resumed.history == whole.history
    changed = {**arguments, "loss": {"a": on_images, "b": (on_images, 3.0)}}
    with pytest.raises(ValueError, match=r"resume: .* differs in its loss"):
        doodl_fast.optimize(**changed, num_optimization_steps=5, resume=True)


def test_leaner_losses_are_taken_one_after_another() -> None:
    class Shrinks:
        def __init__(self, size: int) -> None:
            self.size = size

        def __call__(self, images: Tensor) -> Tensor:
            return images.mean()

        def leaner(self) -> Shrinks | None:
            return Shrinks(self.size - 1) if self.size else None

    losses: Losses | None = Losses.of([Shrinks(1), on_images, Shrinks(1)])
    sizes = []
    while losses is not None:
        sizes.append([getattr(term.function, "size", None) for term in losses.terms])
        losses = losses.leaner()
    assert sizes == [[1, None, 1], [0, None, 1], [0, None, 0]]
