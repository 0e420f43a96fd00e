"""Losses and pieces of losses without a gradient are named, in an error or once in a warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import latents, tiny_chain
from PIL import Image
from torch import Tensor

import doodl_fast

START = latents(2, 3, 4, 4)[0]


def run(loss: Any, **options: Any) -> doodl_fast.Result:
    return doodl_fast.optimize(
        tiny_chain(), START, None, loss, **{"progress": False, "num_optimization_steps": 2, **options}
    )


def said(loss: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(loss, **options)
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


def fine(images: Tensor) -> Tensor:
    return images.square().mean()


def detached(images: Tensor) -> Tensor:
    return torch.as_tensor(images.detach().cpu().numpy()).mean()


def through_pil(images: Tensor) -> Tensor:
    picture = Image.fromarray(images[0, 0].numpy())
    return torch.as_tensor(picture.getpixel((0, 0)))


def test_a_loss_that_leaves_pytorch_is_named() -> None:
    with pytest.raises(ValueError, match=r"loss 'reward': expected a loss that stays in PyTorch, as NumPy and PIL"):
        run({"fine": fine, "reward": through_pil})
    with pytest.raises(ValueError, match=r"^loss: expected a loss that stays in PyTorch"):
        run(through_pil)

    def other(images: Tensor) -> Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run(other)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_loss_without_a_gradient_beside_others_is_named_once(per_sample: bool) -> None:
    messages = said({"fine": fine, "reward": (detached, 2.0)}, per_sample=per_sample)
    assert len(messages) == 1 and messages[0].startswith("loss 'reward': the value has no gradient, so it is logged")


def test_a_loss_that_is_only_logged_is_not_warned_about() -> None:
    assert said({"fine": fine, "logged": (detached, 0.0)}) == []
    assert said([fine, lambda start: start.square().mean()]) == []


def test_a_regulariser_of_what_is_no_variable_is_named() -> None:
    messages = said({"fine": fine, "start": lambda start: start.square().mean()}, variables=["prompt_embeds"])
    assert len(messages) == 1 and "loss 'start': the value has no gradient" in messages[0]
    assert "something that is no variable" in messages[0]


def test_a_gradient_of_zero_is_named_by_its_variable() -> None:
    messages = said(lambda images: images.round().mean())
    assert len(messages) == 1 and messages[0].startswith(
        "variables['start']: its gradient is 0 everywhere in the first"
    )

    def mixed(images: Tensor, prompt_embeds: Tensor) -> Tensor:
        return images.square().mean() + 0 * prompt_embeds.sum()

    class Deaf(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return x.sin() + 0 * cond.sum()

    chain = tiny_chain(network=Deaf())
    with pytest.warns(RuntimeWarning, match=r"variables\['prompt_embeds'\]: its gradient is 0 everywhere") as caught:
        doodl_fast.optimize(chain, START, None, mixed, 2, variables=["start", "prompt_embeds"], progress=False)
    assert len([w for w in caught if "gradient is 0" in str(w.message)]) == 1


def test_losses_with_a_gradient_are_not_warned_about() -> None:
    assert said(fine) == [] and said({"a": fine, "b": (fine, 0.5)}) == []
