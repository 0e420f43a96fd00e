"""Chains of HunyuanDiT have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import tiny_dits
import torch
from conftest import relative
from family_oracle import check_gradient, check_pictures

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

OPTIONS: dict[str, Any] = {"num_inference_steps": 5}
SIZE = {"height": 32, "width": 48}
WHOLE = {"use_resolution_binning": False}
pytestmark = pytest.mark.filterwarnings("ignore:height, width")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_dits.hunyuan_dit()


def embeddings(pipe: Any) -> dict[str, Any]:
    names = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
    found = {}
    for index, suffix in enumerate(("", "_2")):
        made = pipe.encode_prompt("a dog", "cpu", negative_prompt="ugly cat", text_encoder_index=index)
        found |= {f"{name}{suffix}": value for name, value in zip(names, made, strict=True)}
    return found


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize(
    "more",
    [
        {"negative_prompt": "ugly"},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"original_size": (512, 256), "target_size": (64, 64), "crops_coords_top_left": (8, 4)},
    ],
)
def test_latents_and_pictures(pipe: Any, solver: Any, more: dict[str, Any]) -> None:
    chain = check_pictures(solver, pipe, "a dog", {**OPTIONS, **SIZE, **more}, pipeline_only=WHOLE)
    assert chain.noise().shape == (1, 4, 4, 6)


def test_a_batch_of_prompts_and_tall_pictures() -> None:
    pipe = tiny_dits.hunyuan_dit(is_told=False)
    prompts, negatives = ["a dog", "a circle"], ["ugly", "blurred"]
    options = {**OPTIONS, "height": 64, "width": 32, "negative_prompt": negatives}
    chain = check_pictures(DDIM, pipe, prompts, options, pipeline_only=WHOLE)
    assert chain.noise(height=32).shape == (2, 4, 4, 4), "this network is not told the size"


def test_the_noise_of_its_own_scheduler_is_the_pipelines() -> None:
    own = diffusers.DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    pipe = tiny_dits.hunyuan_dit(own)
    chain = Sampler.from_pipeline(pipe, "a dog", memory="checkpoint", **OPTIONS, **SIZE)
    generator = torch.Generator().manual_seed(3)
    x = chain.noise(generator=generator)
    noise = chain.draw_noise(x, generator=generator)
    options = {**OPTIONS, **SIZE, **WHOLE, "output_type": "latent", "generator": torch.Generator().manual_seed(3)}
    with torch.no_grad():
        assert noise and relative(chain(x, noise)[0], pipe("a dog", **options).images) < 1e-5


def test_rescaled_guidance_has_the_deviation_of_the_prompt_alone(pipe: Any) -> None:
    full, alone = (
        DDIM.from_pipeline(pipe, "a dog", **OPTIONS, **guidance)
        for guidance in ({"guidance_rescale": 1.0}, {"guidance_scale": 1.0})
    )
    x = full.noise(seed=4)
    with torch.no_grad():
        guided, cond = full.denoiser(x, 500), alone.denoiser(x, 500)
    assert abs(guided.std() / cond.std() - 1) < 1e-5 and relative(guided, cond) > 1e-2


@pytest.mark.parametrize(
    ("solver", "memory", "more"),
    [(DDIM, "checkpoint", {}), (DDIM, "auto", {"guidance_rescale": 0.7}), (EDICT, "reversible", {})],
)
def test_gradient_is_that_of_plain_autograd(pipe: Any, solver: Any, memory: str, more: dict[str, Any]) -> None:
    check_gradient(solver, pipe, memory, embeddings(pipe), {**OPTIONS, **more})


def test_what_does_not_fit_is_refused_or_said(pipe: Any) -> None:
    def make(*args: Any, **options: Any) -> Any:
        return DDIM.from_pipeline(pipe, *args, num_inference_steps=2, **options)

    given = embeddings(pipe)
    with pytest.warns(RuntimeWarning, match=r"^height, width: 32 x 48 is used as it is; the pipeline's use_resol") as w:
        make("a dog", **SIZE)
    assert [one.filename for one in w] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("a dog")
    with pytest.raises(ValueError, match=r"width: expected a positive multiple of 16 .* patch of 2\), got 24"):
        make("a dog", width=24)
    with pytest.raises(
        ValueError, match=r"height: expected 32, the size that this chain's conditions tell the network"
    ):
        make("a dog").noise(height=64)
    with pytest.raises(TypeError, match=r"^max_sequence_length: from_pipeline has no such argument for HunyuanDiTPipe"):
        make("a dog", max_sequence_length=8)
    with pytest.raises(ValueError, match=r"^prompt_embeds_2: expected a tensor because prompt_embeds is given, got N"):
        make(prompt_embeds=given["prompt_embeds"], prompt_attention_mask=given["prompt_attention_mask"])
    with pytest.raises(ValueError, match=r"^prompt_embeds: expected 77 tokens, padding included, got 76"):
        make(**{**given, "prompt_embeds": given["prompt_embeds"][:, :76]})
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        make("a dog", ["ugly", "blurred"])
    flow = tiny_dits.hunyuan_dit(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(TypeError, match=r"^scheduler: FlowMatchEuler.* not right for pipelines of the family Hunyuan"):
        DDIM.from_pipeline(flow, "a dog")
