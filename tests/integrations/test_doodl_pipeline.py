"""`DoodlPipeline` against `optimize` by hand, and against the diffusers pipeline that it stands for."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import doodl_fast
from doodl_fast import shapes
from doodl_fast.guidance import Symmetry
from doodl_fast.integrations import DoodlPipeline

PROMPT = "a red circle left of a blue square"
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 4.0, "num_optimization_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return shapes.load_pipeline()


def test_it_does_what_optimize_does(pipe):
    out = DoodlPipeline.from_pipe(pipe)(
        PROMPT, Symmetry(), generator=torch.Generator().manual_seed(3), grad_scale=20.0, output_type="pt", **OPTIONS
    )
    chain = doodl_fast.EDICT.from_pipeline(pipe, PROMPT, num_inference_steps=3, guidance_scale=4.0)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    result = doodl_fast.optimize(chain, noise, chain.decode, Symmetry(), 2, grad_scale=20.0, progress=False)
    assert out.losses == result.losses and len(set(out.losses)) == 2
    assert torch.equal(out.images, (result.images[0] / 2 + 0.5).clamp(0, 1))
    assert out.nsfw_content_detected is None and out.result.best_loss == result.best_loss


def test_its_noise_makes_the_same_picture_in_the_pipeline(pipe):
    """With DDIM the pipeline itself is the oracle: it samples the picture from the optimised noise."""
    options = {**OPTIONS, "generator": torch.Generator().manual_seed(0), "grad_scale": 20.0}
    noise, _ = DoodlPipeline.from_pipe(pipe, doodl_fast.DDIM)(
        PROMPT, Symmetry(), output_type="latent", return_dict=False, **options
    )
    options["generator"] = torch.Generator().manual_seed(0)
    picture = DoodlPipeline(pipe, doodl_fast.DDIM)(PROMPT, Symmetry(), output_type="np", **options).images
    theirs = pipe(PROMPT, latents=noise.float(), num_inference_steps=3, guidance_scale=4.0, output_type="np").images
    assert np.abs(picture - theirs).max() < 1e-4
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    unchanged = pipe(PROMPT, latents=start, num_inference_steps=3, guidance_scale=4.0, output_type="np").images
    assert np.abs(picture - unchanged).max() > 1e-3


def test_several_pictures_and_output_types(pipe):
    ours = DoodlPipeline.from_pipe(pipe, doodl_fast.DDIM)
    options = {**OPTIONS, "num_optimization_steps": 1}
    out = ours([PROMPT, "a green star"], Symmetry(), num_images_per_prompt=2, **options)
    assert [type(image) for image in out.images] == [Image.Image] * 4 and out["losses"] == out.losses
    assert out.images[0].size == (64, 64)
    batch = ours(PROMPT, Symmetry(), num_images_per_prompt=2, output_type="pt", **options).images
    assert batch.shape == (2, 3, 64, 64) and not torch.equal(batch[0], batch[1])


def test_the_rest_is_the_pipelines(pipe):
    ours = DoodlPipeline.from_pipe(pipe)
    assert ours.unet is pipe.unet and ours.components.keys() == pipe.components.keys()
    assert isinstance(ours.scheduler, DDIMScheduler)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = ours.no_such_thing
    assert pickle.loads(pickle.dumps(DoodlPipeline(SimpleNamespace(name="x")))).name == "x"


def test_callbacks_are_diffusers(pipe):
    seen = []

    def stop(self, step, timestep, values):
        seen.append((step, timestep, sorted(values), values["loss"]))
        self.interrupt = step == 1
        return values

    ours = DoodlPipeline(pipe, doodl_fast.DDIM)
    out = ours(PROMPT, Symmetry(), callback_on_step_end=stop, **{**OPTIONS, "num_optimization_steps": 5})
    first = doodl_fast.DDIM.from_pipeline(pipe, PROMPT, num_inference_steps=3).schedule.timesteps[0]
    assert [(step, t, names) for step, t, names, _ in seen] == [
        (step, first, ["images", "latents", "loss"]) for step in range(2)
    ]
    assert [loss for *_, loss in seen] == out.losses
    with pytest.raises(ValueError, match="callback_on_step_end: it returned other latents"):
        ours(PROMPT, Symmetry(), callback_on_step_end=lambda *_: {"latents": torch.zeros(1)}, **OPTIONS)


def test_a_safety_checker_is_asked(pipe):
    def checker(images, clip_input):
        assert images.min() < -0.1 and images.requires_grad is False
        return images.clone().mul_(torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1)), [False, True]

    features = SimpleNamespace(pixel_values=torch.zeros(2, 3, 8, 8))
    parts = {**vars(pipe), "safety_checker": checker}
    parts["feature_extractor"] = lambda pictures, return_tensors: SimpleNamespace(to=lambda device: features)
    with_checker = object.__new__(type(pipe))
    with_checker.__dict__.update(parts)
    options = {**OPTIONS, "num_optimization_steps": 1, "output_type": "pt", "num_images_per_prompt": 2}
    plain = DoodlPipeline(pipe, doodl_fast.DDIM)(
        PROMPT, Symmetry(), generator=torch.Generator().manual_seed(0), **options
    )
    out = DoodlPipeline(with_checker, doodl_fast.DDIM)(
        PROMPT, Symmetry(), generator=torch.Generator().manual_seed(0), **options
    )
    assert out.nsfw_content_detected == [False, True]
    assert torch.equal(out.images[0], plain.images[0]) and not out.images[1].any()


def test_bad_input_is_named(pipe):
    ours = DoodlPipeline(pipe)
    with pytest.raises(TypeError, match=r"loss: expected a function of images.*got None"):
        ours(PROMPT)
    with pytest.raises(ValueError, match="output_type: expected one of pil, np, pt, latent, got 'gif'"):
        ours(PROMPT, Symmetry(), output_type="gif")
    with pytest.raises(ValueError, match="num_images_per_prompt: expected a positive int, got 0"):
        ours(PROMPT, Symmetry(), num_images_per_prompt=0)
    with pytest.raises(TypeError, match="eta: from_pipeline has no such argument"):
        ours(PROMPT, Symmetry(), eta=0.5)
    with pytest.raises(TypeError, match="solver: expected a class of solvers"):
        DoodlPipeline(pipe, solver="DDIM")


def test_it_loads_a_model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DoodlPipeline.from_pretrained(tmp_path, doodl_fast.DDIM)
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
