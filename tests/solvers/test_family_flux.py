"""Chains of FLUX.1 pipelines have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from conftest import relative

from doodl_fast.diffusion.families.flux import pack, unpack
from doodl_fast.solvers.sampler import Sampler

STEPS = 4
TRUE_CFG = {"true_cfg_scale": 3.0, "negative_prompt": "ugly"}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("flux")
    made = {"dev": tiny_families.flux(work), "schnell": tiny_families.flux(work, guidance_embeds=False)}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("kind", ["dev", "schnell"])
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0}, TRUE_CFG])
def test_latents_and_pictures(pipes: dict[str, Any], kind: str, guidance: dict[str, Any]) -> None:
    pipe = pipes[kind]
    options = {"num_inference_steps": STEPS, "max_sequence_length": 8, "height": 16, "width": 24, **guidance}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "guidance_scale: it is not used")
        chain = Sampler.from_pipeline(pipe, "a dog", memory="checkpoint", **options)
        other = Sampler.from_pipeline(pipe, "a cat", memory="checkpoint", **options)
    x = chain.noise(seed=3)
    assert x.shape == (1, 4, 8, 12)
    options["latents"] = pipe._pack_latents(x, 1, 4, 8, 12)
    expected = pipe("a dog", output_type="latent", **options).images
    with torch.no_grad():
        (x0,) = chain(x)
        images = (chain.decode(x0) + 1) / 2
        assert relative(pack(other(x)[0]), expected) > 1e-3, "the prompt must matter"
    assert relative(options["latents"], expected) > 0.1, "the weights must matter"
    assert relative(pack(x0), expected) < 1e-5
    assert relative(images.clamp(0, 1), pipe("a dog", output_type="pt", **options).images) < 1e-5


def test_the_guidance_scale_is_an_input_of_the_network(pipes: dict[str, Any]) -> None:
    options = {"num_inference_steps": STEPS, "memory": "checkpoint", "max_sequence_length": 8}
    chains = [Sampler.from_pipeline(pipes["dev"], "a dog", guidance_scale=scale, **options) for scale in (1.0, 6.0)]
    x = chains[0].noise()
    assert not any(chain.denoiser.guided for chain in chains)
    with torch.no_grad():
        assert relative(chains[0](x)[0], chains[1](x)[0]) > 1e-3


def test_a_batch_of_prompts_and_the_pipelines_own_noise_and_size(pipes: dict[str, Any]) -> None:
    pipe, prompts = pipes["dev"], ["a dog", "a cat"]
    options: dict[str, Any] = {"num_inference_steps": STEPS, "max_sequence_length": 8}
    chain = Sampler.from_pipeline(pipe, prompts, memory="checkpoint", **options)
    x = chain.noise(seed=5)
    drawn, _ = pipe.prepare_latents(2, 4, 16, 16, torch.float32, "cpu", torch.Generator().manual_seed(5))
    assert torch.equal(pack(x), drawn)
    expected = pipe(prompts, latents=drawn, output_type="latent", height=16, width=16, **options).images
    with torch.no_grad():
        assert relative(pack(chain(x)[0]), expected) < 1e-5, "the default guidance scale is the pipeline's"


def test_packing_is_the_pipelines_and_is_undone() -> None:
    x = torch.arange(2 * 4 * 6 * 8.0).reshape(2, 4, 6, 8)
    assert torch.equal(pack(x), diffusers.FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(x), 6, 8), x)


@pytest.mark.parametrize("memory", ["checkpoint", "auto"])
@pytest.mark.parametrize("true_cfg_scale", [1.0, 2.0])
def test_gradient_is_that_of_plain_autograd(pipes: dict[str, Any], memory: str, true_cfg_scale: float) -> None:
    pipe, gradients = pipes["dev"], []
    options: dict[str, Any] = {"num_inference_steps": STEPS, "true_cfg_scale": true_cfg_scale}
    texts = {"": "a dog", "negative_": "ugly"} if true_cfg_scale > 1 else {"": "a dog"}
    for mode in ("naive", memory):
        given = {}
        for prefix, text in texts.items():
            embeds, pooled, _ = pipe.encode_prompt(text, device="cpu", max_sequence_length=8)
            given[f"{prefix}prompt_embeds"] = embeds.detach().clone().requires_grad_()
            given[f"{prefix}pooled_prompt_embeds"] = pooled.detach().clone().requires_grad_()
        chain = Sampler.from_pipeline(pipe, memory=mode, **options, **given)
        x = chain.noise(seed=1).requires_grad_()
        loss = chain.decode(chain(x)[0]).square().mean()
        gradients.append(torch.autograd.grad(loss, [x, *given.values()]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-5


def test_what_has_no_effect_is_said(pipes: dict[str, Any]) -> None:
    with pytest.warns(RuntimeWarning, match=r"^negative_prompt: it is not used with true_cfg_scale=1; classi") as found:
        Sampler.from_pipeline(pipes["dev"], "a dog", "ugly", 2)
    assert [w.filename for w in found] == [__file__]
    with pytest.warns(RuntimeWarning, match=r"^true_cfg_scale: 2 is not used without a negative prompt") as found:
        Sampler.from_pipeline(pipes["dev"], "a dog", num_inference_steps=2, true_cfg_scale=2.0)
    assert [w.filename for w in found] == [__file__]
    with pytest.warns(RuntimeWarning, match=r"^guidance_scale: it is not used, because this network") as found:
        Sampler.from_pipeline(pipes["schnell"], "a dog", num_inference_steps=2, guidance_scale=3.5)
    assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler.from_pipeline(pipes["schnell"], "a dog", num_inference_steps=2)


def test_what_does_not_fit_is_refused(pipes: dict[str, Any]) -> None:
    pipe = pipes["dev"]
    with pytest.raises(ValueError, match=r"width: expected a positive multiple of 4 .* patch of 2\), got 18"):
        Sampler.from_pipeline(pipe, "a dog", width=18)
    chain = Sampler.from_pipeline(pipe, "a dog", num_inference_steps=2)
    with pytest.raises(ValueError, match=r"height: expected 16, the size that this chain's schedule is for \(use_dyna"):
        chain.noise(height=32)
    assert Sampler.from_pipeline(pipes["schnell"], "a dog", num_inference_steps=2).noise(height=32).shape[-2] == 16
    with pytest.raises(TypeError, match=r"^ip_adapter_image: from_pipeline has no such argument for FluxPipeline"):
        Sampler.from_pipeline(pipe, "a dog", ip_adapter_image=3)
    with pytest.raises(ValueError, match=r"^negative_pooled_prompt_embeds: expected a tensor because negative_prompt"):
        Sampler.from_pipeline(pipe, "a dog", true_cfg_scale=2.0, negative_prompt_embeds=torch.zeros(1, 8, 32))
    wide = diffusers.FluxTransformer2DModel.from_config({**pipe.transformer.config, "in_channels": 20})
    with pytest.raises(ValueError, match=r"^pipe: expected a transformer of 16 input channels .* got 20: FLUX's Fill"):
        Sampler.from_pipeline(diffusers.FluxPipeline(**{**pipe.components, "transformer": wide}), "a dog")
    adapted = diffusers.FluxTransformer2DModel.from_config(pipe.transformer.config)
    adapted.encoder_hid_proj = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^pipe: FluxPipeline has an IP-Adapter, which from_pipeline would ignore"):
        Sampler.from_pipeline(diffusers.FluxPipeline(**{**pipe.components, "transformer": adapted}), "a dog")


def test_pipelines_for_other_tasks_are_refused_by_name(pipes: dict[str, Any]) -> None:
    other = diffusers.FluxInpaintPipeline(**pipes["dev"].components)
    with pytest.raises(TypeError, match=r"^pipe: from_pipeline does not know FluxInpaintPipeline; expected one of "):
        Sampler.from_pipeline(other, "a dog")
