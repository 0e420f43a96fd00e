"""Chains of Stable Diffusion 3 have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from conftest import relative

from doodl_fast.solvers.sampler import DPMSolver, Sampler

STEPS = 4
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = tiny_families.stable_diffusion_3(tmp_path_factory.mktemp("sd3"))
    made.set_progress_bar_config(disable=True)
    return made


def embeddings(pipe: Any) -> dict[str, Any]:
    encoded = pipe.encode_prompt(prompt="a dog", prompt_2=None, prompt_3=None, device="cpu", negative_prompt="ugly")
    return dict(zip(EMBEDDINGS, encoded, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("guidance_scale", "negative"), [(3.0, "ugly"), (7.0, ""), (1.0, "")])
def test_latents_and_pictures(pipe: Any, guidance_scale: float, negative: str, dynamic: bool) -> None:
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    chain = Sampler.from_pipeline(
        pipe, "a dog", negative, STEPS, guidance_scale, memory="checkpoint", height=16, width=24, max_sequence_length=8
    )
    x = chain.noise(seed=3)
    assert x.shape == (1, 4, 8, 12)
    options: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": STEPS, "max_sequence_length": 8}
    options |= {"guidance_scale": guidance_scale, "negative_prompt": negative, "latents": x}
    expected = pipe("a dog", output_type="latent", **options).images
    with torch.no_grad():
        (x0,) = chain(x)
        images = (chain.decode(x0) + 1) / 2
    assert relative(x, expected) > 0.1, "the weights must matter"
    assert relative(x0, expected) < 1e-5
    assert relative(images.clamp(0, 1), pipe("a dog", output_type="pt", **options).images) < 1e-5
    other = Sampler.from_pipeline(
        pipe, "a cat", negative, STEPS, guidance_scale, memory="checkpoint", height=16, width=24, max_sequence_length=8
    )
    with torch.no_grad():
        assert relative(other(x)[0], expected) > 1e-3, "the prompt must matter"


def test_a_batch_of_prompts_and_the_pipelines_own_noise_and_size(pipe: Any) -> None:
    prompts, negatives = ["a dog", "a cat"], ["ugly", "blurred"]
    chain = Sampler.from_pipeline(pipe, prompts, negatives, STEPS, memory="checkpoint", max_sequence_length=8)
    x = chain.noise(seed=5)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(x, pipe.prepare_latents(2, 4, 16, 16, torch.float32, "cpu", generator))
    options: dict[str, Any] = {"num_inference_steps": STEPS, "max_sequence_length": 8, "output_type": "latent"}
    expected = pipe(prompts, negative_prompt=negatives, latents=x, **options).images
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5, "the default guidance scale is the pipeline's"


@pytest.mark.parametrize("memory", ["checkpoint", "auto"])
def test_gradient_is_that_of_plain_autograd(pipe: Any, memory: str) -> None:
    gradients = []
    for mode in ("naive", memory):
        given = {name: value.clone().requires_grad_() for name, value in embeddings(pipe).items()}
        chain = Sampler.from_pipeline(pipe, num_inference_steps=STEPS, guidance_scale=3.0, memory=mode, **given)
        x = chain.noise(seed=1).requires_grad_()
        loss = chain.decode(chain(x)[0]).square().mean()
        gradients.append(torch.autograd.grad(loss, [x, *given.values()]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-5


SKIP = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.6}


def test_skip_layer_guidance(pipe: Any) -> None:
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "max_sequence_length": 8}
    chain = Sampler.from_pipeline(pipe, "a dog", "ugly", memory="checkpoint", **options, **SKIP)
    x = chain.noise(seed=3)
    options |= {"negative_prompt": "ugly", "latents": x, "output_type": "latent"}
    expected = pipe("a dog", **options, **SKIP).images
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5
    assert relative(pipe("a dog", **options).images, expected) > 1e-3, "the layers must matter"
    whole = {**SKIP, "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_scale": 1.0}
    gradients = []
    for memory in ("naive", "checkpoint"):
        given = {name: value.clone().requires_grad_() for name, value in embeddings(pipe).items()}
        chain = Sampler.from_pipeline(pipe, num_inference_steps=3, guidance_scale=3.0, memory=memory, **given, **whole)
        start = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(chain(start)[0].square().mean(), [start, *given.values()]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-5


def test_skip_layer_guidance_that_does_not_fit_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"^skip_guidance_layers: expected numbers of layers from 0 to 1, got \[7\]"):
        Sampler.from_pipeline(pipe, "a dog", skip_guidance_layers=[7])
    with pytest.raises(TypeError, match=r"^skip_guidance_layers: expected a list of ints, got 1"):
        Sampler.from_pipeline(pipe, "a dog", skip_guidance_layers=1)
    with pytest.raises(ValueError, match=r"^skip_guidance_layers: expected None without guidance"):
        Sampler.from_pipeline(pipe, "a dog", guidance_scale=1.0, skip_guidance_layers=[1])
    with pytest.raises(ValueError, match=r"^skip_layer_guidance_scale: expected None without skip_guidance_layers"):
        Sampler.from_pipeline(pipe, "a dog", skip_layer_guidance_scale=2.0)


def test_it_is_logged_what_was_picked(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "doodl_fast"):
        Sampler.from_pipeline(pipe, num_inference_steps=2, **embeddings(pipe))
    assert "StableDiffusion3Pipeline is served by the family StableDiffusion3" in caplog.text


def test_a_negative_prompt_without_guidance_is_said_to_be_ignored(pipe: Any) -> None:
    with pytest.warns(RuntimeWarning, match=r"^negative_prompt: it is not used with guidance_scale=1;") as caught:
        Sampler.from_pipeline(pipe, "a dog", "ugly", 2, 1.0)
    assert [w.filename for w in caught if "negative" in str(w.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler.from_pipeline(pipe, "a dog", "ugly", 2, 2.0)


def test_sizes_that_do_not_fit_are_refused(pipe: Any) -> None:
    pattern = r"height: expected a positive multiple of 4 \(the VAE's scale factor, 2, times the network's patch of 2\)"
    with pytest.raises(ValueError, match=pattern + ", got 18; the nearest is 16"):
        Sampler.from_pipeline(pipe, "a dog", height=18)
    with pytest.raises(ValueError, match="width: expected at most 64, for which the network has positions, got 68"):
        Sampler.from_pipeline(pipe, "a dog", width=68)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    chain = Sampler.from_pipeline(pipe, "a dog", num_inference_steps=2, height=16)
    with pytest.raises(ValueError, match=r"height: expected 16, the size that this chain's schedule is for \(use_dyna"):
        chain.noise(height=32)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert Sampler.from_pipeline(pipe, "a dog", num_inference_steps=2).noise(height=32).shape == (1, 4, 16, 8)


def test_arguments_that_do_not_fit_are_refused(pipe: Any) -> None:
    cond = embeddings(pipe)["prompt_embeds"]
    with pytest.raises(TypeError, match=r"^clip_scale: from_pipeline has no such argument for StableDiff"):
        Sampler.from_pipeline(pipe, "a dog", clip_scale=1)
    with pytest.raises(ValueError, match=r"^pooled_prompt_embeds: expected a tensor because prompt_embeds is given"):
        Sampler.from_pipeline(pipe, prompt_embeds=cond)
    with pytest.raises(ValueError, match=r"^prompt: expected None because prompt_embeds is given, got 'a dog'"):
        Sampler.from_pipeline(pipe, "a dog", prompt_embeds=cond)
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        Sampler.from_pipeline(pipe, "a dog", ["ugly", "blurred"])
    with pytest.raises(TypeError, match=r"^guidance_scale: expected a number, got None"):
        Sampler.from_pipeline(pipe, "a dog", guidance_scale=None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^scheduler: FlowMatchEulerDiscreteScheduler cannot be turned into a DPMSolv"
    ):
        DPMSolver.from_pipeline(pipe, "a dog", num_inference_steps=2)


def test_components_that_would_be_ignored_or_are_missing_are_named(pipe: Any) -> None:
    class Controlled(diffusers.StableDiffusion3Pipeline):
        def __init__(self, transformer, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2,
                     text_encoder_3, tokenizer_3, controlnet, image_encoder=None, feature_extractor=None):  # fmt: skip
            super().__init__(transformer, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2,
                             text_encoder_3, tokenizer_3, image_encoder, feature_extractor)  # fmt: skip
            self.register_modules(controlnet=controlnet)

    controlled = Controlled(**pipe.components, controlnet=pipe.vae)
    with (
        pytest.warns(RuntimeWarning, match="pipe: Controlled is used as a StableDiffusion3Pipeline"),
        pytest.raises(ValueError, match=r"^pipe: Controlled has controlnet, which from_pipeline would ignore"),
    ):
        Sampler.from_pipeline(controlled, "a dog")
    bare = diffusers.StableDiffusion3Pipeline(**{**pipe.components, "vae": None})
    with pytest.raises(TypeError, match=r"^pipe: expected StableDiffusion3Pipeline with .* got one without vae"):
        Sampler.from_pipeline(bare, "a dog")
    deaf = diffusers.StableDiffusion3Pipeline(**{**pipe.components, "text_encoder": None})
    with pytest.raises(ValueError, match=r"^prompt: StableDiffusion3Pipeline has no text_encoder, so it cannot encode"):
        Sampler.from_pipeline(deaf, "a dog")
    chain = Sampler.from_pipeline(deaf, num_inference_steps=2, **embeddings(pipe))
    same = Sampler.from_pipeline(pipe, num_inference_steps=2, **embeddings(pipe))
    assert torch.equal(chain(chain.noise())[0], same(chain.noise())[0])


def test_unknown_pipelines_are_refused_by_name(pipe: Any, tmp_path: Path) -> None:
    class Unheard(diffusers.DiffusionPipeline):
        def __init__(self, transformer, scheduler):
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

    unknown = Unheard(pipe.transformer, pipe.scheduler)
    with pytest.raises(TypeError, match=r"^pipe: from_pipeline does not know Unheard; expected one of .*docs/adapters"):
        Sampler.from_pipeline(unknown, "a dog")
