"""Chains of DDPM and DDIM pipelines have the pipeline's own pictures, and the gradient of naive autograd."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from conftest import relative

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

STEPS = 4


def pictures(pipe: Any, generator: torch.Generator, batch: int = 2) -> torch.Tensor:
    """The pipeline's own pictures, (B, C, H, W) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(batch, generator, num_inference_steps=STEPS, output_type="np").images
    return torch.from_numpy(made).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("solver", [DDIM, Sampler])
def test_pictures_are_those_of_a_ddim_pipeline(solver: Any, channels: int) -> None:
    pipe = tiny_families.pixel_space("DDIMPipeline", channels=channels)
    chain = solver.from_pipeline(pipe, num_inference_steps=STEPS, memory="checkpoint")
    x = chain.noise(batch=2, generator=torch.Generator().manual_seed(3))
    assert x.shape == (2, channels, 16, 16)
    expected = pictures(pipe, torch.Generator().manual_seed(3))
    with torch.no_grad():
        images = (chain.decode(chain(x)[0]) + 1) / 2
    assert images.shape == (2, 3, 16, 16)
    assert relative(images[:, :channels].clamp(0, 1), expected) < 1e-5
    assert relative((x / 2 + 0.5).clamp(0, 1), expected) > 0.1, "the weights must matter"


def test_pictures_are_those_of_a_ddpm_pipeline_with_its_noise() -> None:
    pipe = tiny_families.pixel_space("DDPMPipeline", diffusers.DDPMScheduler(clip_sample=False))
    chain = Sampler.from_pipeline(pipe, num_inference_steps=STEPS, memory="checkpoint")
    generator = torch.Generator().manual_seed(3)
    x = chain.noise(batch=2, generator=generator)
    noise = chain.draw_noise(x, generator=generator)
    expected = pictures(pipe, torch.Generator().manual_seed(3))
    with torch.no_grad():
        images = (chain.decode(chain(x, noise)[0]) / 2 + 0.5).clamp(0, 1)
    assert noise and relative(images, expected) < 1e-5


@pytest.mark.parametrize(("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (EDICT, "reversible")])
def test_gradient_is_that_of_plain_autograd(solver: Any, memory: str) -> None:
    pipe, gradients = tiny_families.pixel_space("DDIMPipeline"), []
    for mode in ("naive", memory):
        chain = solver.from_pipeline(pipe, num_inference_steps=STEPS, memory=mode)
        x = chain.noise(seed=1).requires_grad_()
        gradients.append(torch.autograd.grad(chain.decode(chain(x)[0]).square().mean(), x)[0])
    assert gradients[0].norm() > 0 and relative(gradients[1], gradients[0]) < 1e-5


def test_class_labels_reach_the_network() -> None:
    pipe = tiny_families.pixel_space("DDIMPipeline", num_class_embeds=5)
    chain = DDIM.from_pipeline(pipe, num_inference_steps=STEPS, class_labels=torch.tensor([1, 4]))
    x = chain.noise(seed=2)
    assert len(x) == 2
    with torch.no_grad():
        expected = pipe.unet(x, 500, class_labels=torch.tensor([1, 4])).sample
        assert relative(chain.denoiser(x, 500), expected) < 1e-6
        assert relative(pipe.unet(x, 500, class_labels=torch.tensor([2, 3])).sample, expected) > 1e-4


def test_encoding_undoes_decoding() -> None:
    decode = DDIM.from_pipeline(tiny_families.pixel_space("DDIMPipeline"), num_inference_steps=2).decode
    x = torch.rand(1, 3, 4, 4) * 2 - 1
    assert torch.equal(decode.encode(decode(x)), x) and decode.leaner() is None


def test_what_does_not_fit_is_refused() -> None:
    pipe = tiny_families.pixel_space("DDIMPipeline")
    with pytest.raises(ValueError, match=r"^prompt: expected None, because DDIMPipeline has no text, got 'a dog'"):
        DDIM.from_pipeline(pipe, "a dog")
    with pytest.raises(ValueError, match=r"^guidance_scale: expected 1, because DDIMPipeline has no guidance, got 7.5"):
        DDIM.from_pipeline(pipe, guidance_scale=7.5)
    with pytest.raises(TypeError, match=r"^eta: from_pipeline has no such argument for DDIMPipeline"):
        DDIM.from_pipeline(pipe, eta=1.0)
    with pytest.raises(ValueError, match=r"height: expected a positive multiple of 2 .* got 15"):
        DDIM.from_pipeline(pipe, height=15)
    with pytest.raises(ValueError, match=r"clip_sample"):
        DDIM.from_pipeline(tiny_families.pixel_space("DDIMPipeline", diffusers.DDIMScheduler()))
    wide = tiny_families.pixel_space("DDIMPipeline", channels=4)
    with pytest.raises(ValueError, match=r"^pipe: expected a UNet from pictures of 1 or 3 channels to as many, got 4"):
        DDIM.from_pipeline(wide)
