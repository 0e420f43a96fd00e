"""Guidance that is not linear in the two predictions: a function of the caller's combines them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyNet, conditions, latents, pull, relative, sd_scheduler
from tolerances import FP64
from torch import Tensor

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.optimization.fingerprint import differing, fingerprint
from doodl_fast.solvers.edict import EDICT


def keep_norm(uncond: Tensor, cond: Tensor, scale: float, t: Tensor) -> Tensor:
    """Classifier-free guidance that keeps the norm of cond's prediction, but not in the last steps."""
    guided = uncond + scale * (cond - uncond)
    kept = guided * cond.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)
    return torch.where(t < 300, cond, kept)


def denoiser(network: Any = None, **options: Any) -> Denoiser:
    network = TinyNet().double() if network is None else network
    return Denoiser(network, *conditions(), 3.0, vjp_dtype=None, combine=keep_norm, **options)


@pytest.mark.parametrize("t", [100, 500])
def test_it_gets_both_predictions_the_scale_and_the_timestep(t: int) -> None:
    x, (cond, uncond) = latents(2, 3, 4, 4)[0], conditions()
    halves = [Denoiser(TinyNet().double(), states)(x, t) for states in (uncond, cond)]
    expected = keep_norm(*halves, 3.0, torch.tensor(t))
    assert relative(denoiser()(x, t), expected) < FP64
    assert relative(Denoiser(TinyNet().double(), cond, uncond, 3.0)(x, t), expected) > 1e-3
    eps, scale = denoiser().raw(x, t)
    assert scale is None and eps.shape == x.shape


def test_it_is_not_called_without_guidance() -> None:
    x, (cond, uncond) = latents(2, 3, 4, 4)[0], conditions()
    alone = Denoiser(TinyNet().double(), cond, uncond, 1.0, combine=keep_norm)
    assert torch.equal(alone(x, 500), Denoiser(TinyNet().double(), cond)(x, 500))


@pytest.mark.parametrize("memory", ["checkpoint", "auto", 2, "reversible"])
def test_the_gradient_is_that_of_plain_autograd(memory: Any) -> None:
    schedule, gradients = Schedule.from_scheduler(sd_scheduler(), 4), []
    for mode in ("naive", memory):
        cond, uncond = (states.clone().requires_grad_() for states in conditions())
        own = Denoiser(TinyNet().double(), cond, uncond, 3.0, vjp_dtype=None, combine=keep_norm)
        start = list(latents(1, 3, 4, 4, grad=True))
        gradients.append(pull(EDICT(own, schedule, memory=mode)(*start), [*start, cond, uncond]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-10


def test_exact_arithmetic_undoes_it() -> None:
    chain = EDICT(denoiser(), Schedule.from_scheduler(sd_scheduler(), 4), arithmetic="exact")
    start = chain.state(*latents(1, 3, 4, 4))
    assert chain.inverse_state(chain.forward_state(start)).equals(start)


def test_predictions_in_half_precision_are_combined_in_float32() -> None:
    x = latents(1, 3, 4, 4, dtype=torch.float32, grad=True)[0]
    eps, _ = denoiser(TinyNet().half()).raw(x, 500)
    assert eps.dtype == torch.float32
    gradients = []
    for dtype, factor in ((torch.float64, 1.0), (torch.float16, 1e-12)):  # Such a cotangent underflows in fp16.
        chain = EDICT(denoiser(TinyNet().to(dtype)), Schedule.from_scheduler(sd_scheduler(), 2), memory="checkpoint")
        gradients.append(torch.autograd.grad(chain(x)[0].square().mean() * factor, x)[0] / factor)
    assert relative(gradients[1], gradients[0]) < 1e-2


def test_a_run_is_not_resumed_with_other_guidance() -> None:
    schedule = Schedule.from_scheduler(sd_scheduler(), 4)
    plain, kept, other = (
        fingerprint(EDICT(Denoiser(TinyNet(), *conditions(), 3.0, combine=combine), schedule), keep_norm, keep_norm)
        for combine in (None, keep_norm, lambda uncond, cond, scale, t: cond)
    )
    assert differing(kept, kept) is None
    assert differing(plain, kept) and differing(other, kept)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^combine: expected a function \(uncond, cond, guidance_scale, t\) -> eps or"):
        Denoiser(TinyNet(), *conditions(), 3.0, combine=0.7)  # type: ignore[arg-type]
    short = Denoiser(TinyNet().double(), *conditions(), 3.0, combine=lambda uncond, cond, scale, t: cond.mean(1))
    with pytest.raises(ValueError, match=r"^combine: expected it to return a tensor of shape \(1, 3, 4, 4\), got \(1"):
        short(latents(1, 3, 4, 4)[0], 500)
