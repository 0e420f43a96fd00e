"""Chains of DeepFloyd IF's first stage have the pipeline's own pictures, and the gradient of naive autograd."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from conftest import relative
from torch import Tensor
from video_oracle import compare_gradients

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

OPTIONS: dict[str, Any] = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return quiet(tiny_families.deepfloyd_if())


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(pipe: Any) -> dict[str, Tensor]:
    made = pipe.encode_prompt("a dog", negative_prompt="ugly", device="cpu")
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), made, strict=True))


def compare(pipe: Any, solver: Any, noisy: bool = False, **options: Any) -> None:
    """Compares pictures from the pipeline's own noise, and checks that network and prompt matter."""
    chain = solver.from_pipeline(pipe, "a dog", memory="checkpoint", **OPTIONS, **options)
    generator = torch.Generator().manual_seed(3)
    x = chain.noise(generator=generator)
    noise = [chain.draw_noise(x, generator=generator)] if noisy else []
    source = torch.Generator().manual_seed(3)
    expected = pipe("a dog", generator=source, output_type="pt", **OPTIONS, **options).images
    with torch.no_grad():
        images = chain.decode(chain(x, *noise)[0])
        other = solver.from_pipeline(pipe, "a cat", memory="checkpoint", **OPTIONS, **options)(x, *noise)[0]
    assert relative(x, expected) > 0.1, "the weights must matter"
    assert relative(other, expected) > 1e-3, "the prompt must matter"
    assert relative(images, expected) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"height": 16, "width": 24}, {"negative_prompt": "ugly", "guidance_scale": 2.0}, {"guidance_scale": 1.0}],
)
def test_pictures_by_ddim(pipe: Any, options: dict[str, Any]) -> None:
    compare(pipe, DDIM, **options)


@pytest.mark.parametrize("noisy", [False, True])
def test_pictures_by_the_pipelines_own_scheduler(noisy: bool) -> None:
    fixed = {"variance_type": "fixed_small", "clip_sample": False}
    scheduler = diffusers.DDPMScheduler(**fixed) if noisy else diffusers.DPMSolverMultistepScheduler()
    compare(quiet(tiny_families.deepfloyd_if(scheduler)), Sampler, noisy)


def test_a_batch_of_prompts(pipe: Any) -> None:
    prompts, negatives = ["a dog", "a cat"], ["ugly", "blurred"]
    chain = DDIM.from_pipeline(pipe, prompts, negatives, memory="checkpoint", **OPTIONS)
    x = chain.noise(generator=torch.Generator().manual_seed(5))
    options = {"generator": torch.Generator().manual_seed(5), "output_type": "pt"}
    expected = pipe(prompts, negative_prompt=negatives, **options, **OPTIONS).images
    assert x.shape == (2, 3, 16, 16)
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5, "the default guidance scale is the pipeline's"


@pytest.mark.parametrize(
    ("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (EDICT, "reversible"), (EDICT, "checkpoint")]
)
def test_gradient_is_that_of_plain_autograd(pipe: Any, solver: Any, memory: str) -> None:
    compare_gradients(pipe, solver, memory, {"guidance_scale": 2.0, **OPTIONS}, lambda: embeddings(pipe))


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"^height: expected a positive multiple of 2 .* got 15"):
        DDIM.from_pipeline(pipe, "a dog", height=15)
    with pytest.raises(TypeError, match=r"^image: from_pipeline has no such argument for IFPipeline"):
        DDIM.from_pipeline(pipe, "a dog", image=3)
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        DDIM.from_pipeline(pipe, "a dog", ["ugly", "blurred"])
    narrow = tiny_families.deepfloyd_if(out_channels=3)
    with pytest.raises(ValueError, match=r"^pipe: expected a UNet from 3 channels to 6, .* got one from 3 to 3"):
        DDIM.from_pipeline(narrow, "a dog")
    marked = tiny_families.deepfloyd_if()
    marked.watermarker = torch.nn.Identity()
    with pytest.warns(RuntimeWarning, match=r"^pipe: its watermarker is not part of the chain, so pictures") as caught:
        DDIM.from_pipeline(marked, "a dog", **OPTIONS)
    assert [w.filename for w in caught] == [__file__]
    larger = diffusers.IFSuperResolutionPipeline(
        **pipe.components, image_noising_scheduler=pipe.scheduler, requires_safety_checker=False
    )
    with pytest.raises(TypeError, match=r"^pipe: expected a Stable Diffusion .* got IFSuperResolutionPipeline without"):
        DDIM.from_pipeline(larger, "a dog")


def test_schedulers_that_cannot_be_followed_are_refused() -> None:
    """The scheduler that comes with IF thresholds its predictions, and draws noise of a predicted variance."""
    own = {"variance_type": "learned_range", "clip_sample": False}
    thresholding = tiny_families.deepfloyd_if(diffusers.DDPMScheduler(thresholding=True, **own))
    with pytest.raises(ValueError, match=r"^scheduler: DDPMScheduler has thresholding=True, which changes every predi"):
        DDIM.from_pipeline(thresholding, "a dog")
    learned = tiny_families.deepfloyd_if(diffusers.DDPMScheduler(**own))
    with pytest.raises(ValueError, match=r"^scheduler: DDPMScheduler has variance_type='learned_range', so the deviat"):
        Sampler.from_pipeline(learned, "a dog", **OPTIONS)
    fixed = diffusers.DDPMScheduler(thresholding=True, variance_type="fixed_small", clip_sample=False)
    with pytest.raises(ValueError, match=r"^scheduler: the steps of DDPMScheduler are not linear .* thresholding, or"):
        Sampler.from_pipeline(tiny_families.deepfloyd_if(fixed), "a dog", **OPTIONS)
    with pytest.warns(RuntimeWarning, match=r"^DDPMScheduler: not part of the chain: the noise that it adds in every"):
        DDIM.from_pipeline(learned, "a dog", **OPTIONS)
