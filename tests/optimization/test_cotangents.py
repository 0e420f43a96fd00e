"""The gradients of an optimisation in float16 do not depend on the scale of the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from conftest import golden_denoiser, golden_unet, latents, relative, sd_scheduler
from tiny_pipeline import golden_vae, golden_vae_copy
from torch import Tensor

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.pipeline import Decoder
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.optimization import OneStepGuidance
from doodl_fast.optimization.objective import Objective
from doodl_fast.solvers.edict import EDICT

SCALES = (1.0, 1e-2, 1e-4, 1e-6, 1e4)
HALF = torch.float16


def loss(images: Tensor) -> Tensor:
    """The mean over many pixels makes every cotangent small."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    return (images - images.flip(-1)).square().mean()


def plain_decoder(z: Tensor) -> Tensor:
    """A decoder of the caller's own: it expects float16 and returns float16."""
    assert z.dtype == HALF
    images: Tensor = golden_vae(HALF).decode(z / 0.18215).sample
    return images


def start() -> Tensor:
    return latents(1, 4, 16, 16, dtype=HALF)[0]


def schedule() -> Schedule:
    return Schedule.from_scheduler(sd_scheduler(), 3)


def denoiser(dtype: torch.dtype) -> Denoiser:
    """In `dtype`, with weights and conditions rounded to float16."""
    half = golden_denoiser(HALF)
    unet = copy.deepcopy(golden_unet(torch.float32)).to(dtype)
    unet.load_state_dict(golden_unet(HALF).state_dict())
    assert half.cond is not None and half.uncond is not None
    return Denoiser(unet, half.cond.to(dtype), half.uncond.to(dtype), half.guidance_scale, vjp_dtype=None)


@cache
def exact_gradient() -> Tensor:
    """The gradient by plain backpropagation in float64."""
    vae = golden_vae_copy(torch.float64)
    vae.load_state_dict(golden_vae(HALF).state_dict())
    x, y = (start().double().requires_grad_() for _ in range(2))
    x0, y0 = EDICT(denoiser(torch.float64), schedule(), memory="naive")(x, y)
    decode = Decoder(vae)
    return torch.stack(torch.autograd.grad(loss(decode(x0)) + loss(decode(y0)), (x, y)))


def error(decode: Callable[[Tensor], Tensor], scale: float, network_dtype: torch.dtype = HALF) -> float:
    """Relative error of the gradient with float16 latents."""
    chain = EDICT(denoiser(network_dtype), schedule())
    objective = Objective(chain, decode, lambda images: scale * loss(images), HALF, 2)
    _, _, gradients = objective.gradient([start().float(), start().float()], 0)
    assert all(g.dtype == torch.float32 for g in gradients)
    return relative(torch.stack(gradients).double() / scale, exact_gradient())


@pytest.mark.parametrize("scale", SCALES)
def test_float16_latents_cost_networks_in_float32_nothing(scale: float) -> None:
    vae = golden_vae_copy(torch.float32)
    vae.load_state_dict(golden_vae(HALF).state_dict())
    assert error(Decoder(vae), scale, torch.float32) < 1e-5


@pytest.mark.parametrize("own", [False, True])
def test_the_error_does_not_depend_on_the_scale_of_the_loss(own: bool) -> None:
    """The error that is left is that of float16 networks, whose outputs are rounded and multiplied by guidance."""
    golden_vae(HALF).requires_grad_(False)
    decode: Any = plain_decoder if own else Decoder(golden_vae(HALF))
    errors = [error(decode, scale) for scale in SCALES]
    assert max(errors) < 2e-2
    assert max(errors) < 1.2 * min(errors)


def test_a_float16_loss_of_float16_images() -> None:
    """Even the loss is a float16 number, which limits by what it can be multiplied."""
    x = start().float()

    def gradient(scale: float) -> Tensor:
        objective = Objective(lambda x, y: (x, y), lambda z: z, lambda z: (scale * z).mean(), HALF, 1)
        return objective.gradient([x, x], 0)[2][0]

    for scale in (1.0, 1e-3):
        assert relative(gradient(scale), torch.full_like(x, scale / x.numel())) < 2e-3


def test_zero_and_infinite_gradients_stay_what_they_are() -> None:
    x = start().float()
    objective = Objective(lambda x, y: (x, y), lambda z: z, lambda z: 0 * z.float().sum(), HALF, 1)
    assert float(objective.gradient([x, x], 0)[2][0].abs().max()) == 0
    objective.loss = lambda z: (z.float() - z.float().detach()).sum().sqrt()
    with pytest.raises(FloatingPointError, match="gradient: NaN or Inf at optimisation step 7"):
        objective.gradient([x, x], 7)


def test_guidance_through_one_step_in_float16() -> None:
    """The gradient with respect to float16 latents, against that in float64 through the same networks."""
    vae = golden_vae_copy(torch.float64)
    vae.load_state_dict(golden_vae(HALF).state_dict())

    def gradient(dtype: torch.dtype, decode: Decoder, scale: float) -> Tensor:
        guided = OneStepGuidance(denoiser(dtype), schedule(), decode, lambda images: scale * loss(images))
        return guided.gradient(start().to(dtype), schedule().timesteps[1])

    exact = gradient(torch.float64, Decoder(vae), 1.0)
    for scale in (1e4, 1e2):  # at lower ones the result itself, which has x's dtype, is below float16's range
        assert relative(gradient(HALF, Decoder(golden_vae(HALF)), scale).double() / scale, exact) < 2e-2
