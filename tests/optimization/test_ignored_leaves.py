"""A loss that depends on tensors which the optimisation ignores is said to do so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import latents
from test_low_memory import guide  # noqa: F401
from test_optimize import optimize, problem, quiet_loss
from tiny_pipeline import golden_vae_copy
from torch import Tensor, nn

from doodl_fast.diffusion.pipeline import Decoder


def messages(**changes: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimize(**changes)
    return [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


def test_a_regulariser_on_the_start_is_named_once() -> None:
    """Its weight has no effect on the result, which is what the warning is about."""
    start = problem()["latents"].requires_grad_()

    def loss(images: Tensor, weight: float) -> Tensor:
        return quiet_loss(images) + weight * (2 * start).norm()

    said = messages(loss=lambda images: loss(images, 100.0))
    assert len(said) == 1
    assert "loss: it depends on 1 tensor(s) that require grad" in said[0]
    assert "(2, 4, 5, 5) torch.float32 Tensor" in said[0] and "requires_grad_(False)" in said[0]


def test_weights_that_require_grad_are_named_and_frozen_ones_are_not() -> None:
    network = nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)]).to(problem()["latents"].device)

    def loss(images: Tensor) -> Tensor:
        return network(images).square().mean()

    said = messages(loss=loss)
    assert len(said) == 1 and "8 tensor(s)" in said[0] and "Parameter" in said[0] and "and 5 more" in said[0]
    network.requires_grad_(False)
    assert messages(loss=loss) == []


def test_a_tensor_of_the_decoder_counts() -> None:
    gain = torch.full((), 2.0, device=problem()["latents"].device, requires_grad=True)
    assert "() torch.float32" in messages(decode=lambda z: gain * z)[0]


def test_an_ordinary_loss_is_not_warned_about() -> None:
    assert messages() == [] and messages(loss=quiet_loss) == []


def test_the_warning_is_a_runtime_warning() -> None:
    other = torch.ones((), requires_grad=True)
    with pytest.warns(RuntimeWarning, match="optimize neither changes nor differentiates"):
        optimize(loss=lambda images: quiet_loss(images) + other.to(images.device))


def test_our_decoder_and_guides_freeze_their_weights(guide: Any) -> None:  # noqa: F811
    """Although the caller's networks require grad, also with checkpointed blocks and with cutouts in chunks."""
    vae = golden_vae_copy(torch.float32).requires_grad_(True)
    guide.model.requires_grad_(True)
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    decode: Any = Decoder(vae)
    loss: Any = guide
    while decode is not None and loss is not None:
        assert messages(chain=lambda x, y: (x, y), latents=x, decode=decode, loss=loss) == []
        decode, loss = decode.leaner(), loss.leaner()
