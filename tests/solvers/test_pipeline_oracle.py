"""Latents and pictures of a chain made of a pipeline are those of the pipeline itself, called with a DDIM scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipeline
import torch
from conftest import relative, sd_scheduler
from tolerances import FP32

from doodl_fast.solvers.ddim import DDIM


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {
        "sd": tiny_pipeline.stable_diffusion(tmp_path_factory.mktemp("sd")),
        "xl": tiny_pipeline.stable_diffusion_xl(tmp_path_factory.mktemp("xl")),
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


SCHEDULERS = {
    "eps": {},
    "v": {"prediction_type": "v_prediction", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
    "zero-snr": {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    },
}


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("guidance_scale", "negative"), [(3.0, "ugly"), (7.5, ""), (1.0, ""), (0.0, "")])
def test_latents_and_pictures(
    pipes: dict[str, Any], kind: str, scheduler: str, guidance_scale: float, negative: str
) -> None:
    pipe = pipes[kind]
    pipe.scheduler = sd_scheduler(**SCHEDULERS[scheduler])
    chain = DDIM.from_pipeline(pipe, "a dog", negative, 5, guidance_scale, memory="checkpoint", height=64, width=128)
    x = chain.noise(seed=3, batch=1)
    options: dict[str, Any] = {"height": 64, "width": 128, "num_inference_steps": 5, "guidance_scale": guidance_scale}
    options |= {"negative_prompt": negative or None, "latents": x}
    expected = pipe("a dog", output_type="latent", **options).images
    with torch.no_grad():
        (x0,) = chain(x)
        images = (chain.decode(x0) + 1) / 2
    assert relative(x, expected) > 0.1, "the weights must matter"
    assert relative(x0, expected) < FP32
    assert relative(images.clamp(0, 1), pipe("a dog", output_type="pt", **options).images) < FP32


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_batch_of_prompts(pipes: dict[str, Any], kind: str) -> None:
    pipe, prompts = pipes[kind], ["a dog", "a cat"]
    pipe.scheduler = sd_scheduler()
    chain = DDIM.from_pipeline(pipe, prompts, ["ugly", "blurred"], 4, 3.0, memory="checkpoint")
    x = chain.noise()
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": x, "output_type": "latent"}
    expected = pipe(prompts, negative_prompt=["ugly", "blurred"], **options).images
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < FP32
