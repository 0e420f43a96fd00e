"""1 to 4 steps with SDXL and with networks that embed the guidance scale: the pipeline's own latents and gradients."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from conftest import relative, sd_scheduler
from tiny_extras import assert_same_gradients, pipelines, unet_like, with_parts
from tolerances import FP32

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.sampler import LCM, Sampler

TRAILING = {"timestep_spacing": "trailing"}
CASES: dict[str, tuple[Any, str, dict[str, Any], float]] = {
    "SDXL-Turbo": (Sampler, "EulerAncestralDiscreteScheduler", TRAILING, 0.0),
    "SDXL-Lightning": (Sampler, "EulerDiscreteScheduler", TRAILING, 0.0),
    "SDXL-Lightning, guided": (Sampler, "EulerDiscreteScheduler", TRAILING, 1.5),
    "LCM-LoRA": (LCM, "LCMScheduler", {}, 1.0),
    "DDIM, trailing": (DDIM, "DDIMScheduler", {**TRAILING, "set_alpha_to_one": True}, 1.0),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pipelines(tmp_path_factory.mktemp("pipes"))


@pytest.fixture(scope="module")
def distilled(base: dict[str, Any]) -> Any:
    """A latent consistency model: its UNet embeds the guidance scale."""
    unet = unet_like(base["sd"], time_cond_proj_dim=8).requires_grad_(False)
    scheduler = diffusers.LCMScheduler.from_config(base["sd"].scheduler.config)
    return with_parts("LatentConsistencyModelPipeline", base["sd"], unet=unet, scheduler=scheduler)


def ends(chain: Any, pipe: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """What a chain and a pipeline make of the same noise."""
    x = chain.noise(seed=3)
    expected = pipe(
        "a dog", latents=x, generator=torch.Generator().manual_seed(11), output_type="latent", **options
    ).images
    drawn: dict[str, Any] = {}
    if isinstance(chain, Sampler):
        drawn["noise"] = chain.draw_noise(x, generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        (found,) = chain(x, **drawn)
    assert relative(x, expected) > 0.1
    return found, expected


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_latents_of_sdxl(base: dict[str, Any], case: str, steps: int) -> None:
    solver, name, settings, guidance_scale = CASES[case]
    scheduler = getattr(diffusers, name).from_config(sd_scheduler().config, **settings)
    pipe = with_parts("StableDiffusionXLPipeline", base["xl"], scheduler=scheduler)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": 64, "width": 64}
    chain = solver.from_pipeline(pipe, "a dog", memory="checkpoint", **options)
    assert chain.num_network_calls == steps
    assert relative(*ends(chain, pipe, options)) < FP32


@pytest.mark.parametrize("steps", [1, 4])
def test_latents_of_a_network_that_embeds_the_guidance_scale(distilled: Any, steps: int) -> None:
    options = {"num_inference_steps": steps, "height": 64, "width": 64}
    chains = [
        LCM.from_pipeline(distilled, "a dog", memory="checkpoint", **options, guidance_scale=scale)
        for scale in (8.5, 2.0)
    ]
    found, expected = ends(chains[0], distilled, {**options, "guidance_scale": 8.5})
    assert relative(found, expected) < FP32 and not chains[0].denoiser.guided
    assert relative(ends(chains[1], distilled, options)[0], expected) > 1e-4, "the scale must matter"


def test_gradient_of_one_and_four_steps(base: dict[str, Any], distilled: Any) -> None:
    embeds = distilled.encode_prompt("a dog", "cpu", 1, False)[0]
    for steps in (1, 4):
        chain = LCM.from_pipeline(distilled, "a dog", num_inference_steps=steps, height=64, width=64)
        x = chain.noise(seed=1)

        def make(memory: Any, leaf: Any, *noise: Any, steps: int = steps) -> Any:
            made = LCM.from_pipeline(
                distilled, prompt_embeds=leaf, num_inference_steps=steps, memory=memory, height=64, width=64
            )
            made.step_noise = list(noise)
            return made

        assert_same_gradients(make, [embeds, *chain.draw_noise(x, seed=2)], ["checkpoint", "auto"], x)
