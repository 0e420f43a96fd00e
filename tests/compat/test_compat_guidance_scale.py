"""A guidance scale of at most 1 in `compat`: the reference combines both predictions at every scale.

`Denoiser` by itself treats such scales as diffusers does, which is to use the prediction for the prompt alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, golden, latents, relative
from recorded_gen import pipeline, quick
from tolerances import FP32, FP64
from torch import Tensor

from doodl_fast.compat.doodl import SteppingLayer, gen, get_generic_cond_fn, symmetry_loss_fn

SCALES = [-1.0, 0.0, 0.5, 1.0, 3.0]


class ByHand(SteppingLayer):
    """The formula of the reference, with a network call for each embedding."""

    def predict_noise(self, latent: Tensor, t: Tensor, *extra: Any) -> Tensor:
        uncond, cond = (self.unet(latent, t, e) for e in (self.e_uc, self.e_c))
        return uncond + self.guidance_scale * (cond - uncond)


@pytest.mark.parametrize("scale", SCALES)
def test_layers_combine_at_every_scale(scale: float) -> None:
    cond, uncond = conditions()
    results = []
    for cls in (SteppingLayer, ByHand):
        layer = cls(TinyNet().double(), uncond, cond, num_timesteps=4, guidance_scale=scale)
        pair = torch.cat(latents(1, 3, 4)).to(DEVICE).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            *_, out = layer(0, 500, pair)
        results.append((out, *torch.autograd.grad(out.square().sum(), pair)))
    for got, expected in zip(*results, strict=True):
        assert relative(got, expected) < FP64


@pytest.mark.parametrize("single_variable", [True, False])
def test_gen_at_a_scale_of_zero_samples_with_the_negative_prompt_alone(single_variable: bool) -> None:
    options = quick(latent_traversal=False, grad_scale=0, single_variable=single_variable)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        zero = gen(**options, sd_guidance_scale=0.0)
    prompted = gen(**options, sd_guidance_scale=1.0)
    uncond = golden("models")["embedding_unconditional"]
    own = pipeline()
    own.encode_prompt = lambda **_: (uncond, uncond)
    negative = gen(**{**options, "pipeline": own}, sd_guidance_scale=1.0)
    assert relative(zero.latents[0], negative.latents[0]) < FP32
    assert relative(zero.latents[0], prompted.latents[0]) > 1e-3


def test_conditioning_at_a_scale_of_zero_is_that_of_the_negative_prompt() -> None:
    models = golden("models")
    uncond, cond = models["embedding_unconditional"], models["embedding_conditional"]
    x = golden("gen")["init/latent"]
    results = []
    for prompt, scale in ((cond, 0.0), (uncond, 1.0), (cond, 1.0)):
        cond_fn = get_generic_cond_fn(symmetry_loss_fn("horizontal", 1), uncond, prompt, scale, 4, pipeline=pipeline())
        results.append(cond_fn(x, 250))
    assert relative(results[0], results[1]) < 1e-4
    assert relative(results[0], results[2]) > 1e-2
