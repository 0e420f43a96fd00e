"""`DoodlNoiseStep` in a modular pipeline of diffusers, which samples from the noise that the block has optimised."""

from __future__ import annotations

import pytest
import tiny_pipeline
import torch

import doodl_fast
from doodl_fast.guidance import Symmetry

pytest.importorskip("diffusers.modular_pipelines")

from diffusers import StableDiffusionXLAutoBlocks

from doodl_fast.integrations import DoodlNoiseStep

CALL = {"prompt": "a dog", "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """A tiny SDXL pipeline, and the modular pipeline of its parts with the block in front."""
    whole = tiny_pipeline.stable_diffusion_xl(tmp_path_factory.mktemp("xl"))
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks.insert("doodl", DoodlNoiseStep("stable-diffusion-xl"), 0)
    modular = blocks.init_pipeline()
    names = {component.name for component in modular.blocks.expected_components}
    modular.update_components(**{name: part for name, part in whole.components.items() if name in names and part})
    return whole, modular


def test_the_pipeline_samples_from_the_optimised_noise(pipes):
    whole, modular = pipes
    settings = {"num_optimization_steps": 1, "progress": False, "grad_scale": 100.0, "clip_grad_value": 0.05}
    state = modular(**CALL, loss=Symmetry(), optimization=settings, generator=torch.Generator().manual_seed(2))
    chain = doodl_fast.Sampler.from_pipeline(
        whole, "a dog", num_inference_steps=2, guidance_scale=7.5, height=64, width=64
    )
    start = chain.noise(generator=torch.Generator().manual_seed(2))
    result = doodl_fast.optimize(
        chain,
        start,
        chain.decode,
        Symmetry(),
        1,
        **{name: value for name, value in settings.items() if name != "num_optimization_steps"},
    )
    assert state.get("losses") == result.losses
    made = state.get("images")
    assert (made - (result.images[0] / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-3
    unchanged = modular(**CALL, latents=start, output="images")
    assert (made - unchanged).abs().max() > 1e-2


def test_without_a_loss_the_block_does_nothing(pipes):
    _, modular = pipes
    start = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    state = modular(**CALL, latents=start)
    assert state.get("losses") == []


def test_bad_input_is_named(pipes):
    with pytest.raises(ValueError, match=r"model_name: expected one of stable-diffusion-xl, .*got 'wan'"):
        DoodlNoiseStep("wan")
    with pytest.raises(TypeError, match="optimization: unknown steps"):
        pipes[1](**CALL, loss=Symmetry(), optimization={"steps": 3})
