"""Guidance by three predictions (PAG, InstructPix2Pix): the pipeline's own latents, and naive autograd's gradient."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from conftest import relative
from tiny_extras import assert_same_gradients, chain_and_pipeline, ip_adapter, picture, pipelines, unet_like, with_parts
from tolerances import FP32

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import DPMSolver

PAGS = {"sd": "StableDiffusionPAGPipeline", "xl": "StableDiffusionXLPAGPipeline"}
EDITORS = {"sd": "StableDiffusionInstructPix2PixPipeline", "xl": "StableDiffusionXLInstructPix2PixPipeline"}
SIZE = {"height": 64, "width": 64}
NAMES = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pipelines(tmp_path_factory.mktemp("pipes"))


@pytest.fixture(scope="module")
def pags(base: dict[str, Any]) -> dict[str, Any]:
    made = {kind: with_parts(PAGS[kind], pipe) for kind, pipe in base.items()}
    for pipe in made.values():
        pipe.set_pag_applied_layers(["mid", "up_blocks.0"])
    return made


@pytest.fixture(scope="module")
def editors(base: dict[str, Any]) -> dict[str, Any]:
    return {
        kind: with_parts(EDITORS[kind], pipe, unet=unet_like(pipe, in_channels=8).requires_grad_(False))
        for kind, pipe in base.items()
    }


def embeddings(pipe: Any) -> dict[str, Any]:
    encoded = pipe.encode_prompt("a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    return dict(zip(NAMES, encoded, strict=False))


# Perturbed-attention guidance


@pytest.mark.parametrize("kind", PAGS)
@pytest.mark.parametrize("options", [
    {"guidance_scale": 3.0, "pag_scale": 2.0},
    {"guidance_scale": 1.0},
    {"guidance_scale": 3.0, "pag_scale": 2.0, "pag_adaptive_scale": 0.003},
])  # fmt: skip
def test_latents_with_pag(pags: dict[str, Any], kind: str, options: dict[str, Any]) -> None:
    pipe = pags[kind]
    before = dict(pipe.unet.attn_processors)
    got, expected = chain_and_pipeline(pipe, {**SIZE, **options})
    assert relative(got, expected) < FP32
    without, plain = chain_and_pipeline(pipe, {**SIZE, **options, "pag_scale": 0.0})
    assert relative(without, plain) < FP32 and relative(plain, expected) > 1e-3, "the perturbation must matter"
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


def test_pag_from_a_picture_and_with_an_ip_adapter(base: dict[str, Any], pags: dict[str, Any]) -> None:
    unet = unet_like(base["xl"])
    unet._load_ip_adapter_weights([ip_adapter(unet)])
    pipe = with_parts(PAGS["xl"], base["xl"], unet=unet)
    given = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    got, expected = chain_and_pipeline(pipe, {**SIZE, "guidance_scale": 3.0, "ip_adapter_image_embeds": [given]})
    assert relative(got, expected) < FP32
    pipe = with_parts("StableDiffusionPAGImg2ImgPipeline", base["sd"])
    options = {"image": picture(), "strength": 0.5, "guidance_scale": 3.0, "num_inference_steps": 4}
    chain = DDIM.from_pipeline(pipe, "a dog", memory="checkpoint", **options)
    generator = torch.Generator().manual_seed(2)
    expected = pipe("a dog", **options, generator=generator, output_type="latent").images
    with torch.no_grad():
        assert relative(chain(chain.noise(seed=2))[0], expected) < FP32


@pytest.mark.parametrize("kind", PAGS)
def test_gradient_with_pag(pags: dict[str, Any], kind: str) -> None:
    given = embeddings(pags[kind])

    def make(solver: Any) -> Any:
        return lambda memory, leaf, other: solver.from_pipeline(
            pags[kind], num_inference_steps=3, guidance_scale=3.0, memory=memory, **SIZE,
            **{**given, "prompt_embeds": leaf, "negative_prompt_embeds": other},
        )  # fmt: skip

    leaves = [given["prompt_embeds"], given["negative_prompt_embeds"]]
    x = make(DDIM)("checkpoint", *leaves).noise(seed=1)
    assert_same_gradients(make(DDIM), leaves, ["checkpoint", "auto"], x)
    assert_same_gradients(make(EDICT), leaves, ["reversible"], x)


def test_what_does_not_fit_pag_is_refused(pags: dict[str, Any], base: dict[str, Any]) -> None:
    def refused(match: str, pipe: Any = pags["sd"], **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            DDIM.from_pipeline(pipe, "a dog", num_inference_steps=4, **options)

    refused(r"^pag_scale: expected a number of at least 0, got -1", pag_scale=-1.0)
    missing = with_parts(PAGS["sd"], base["sd"])
    missing.set_pag_applied_layers("none_of_these")
    refused(r"^pag_applied_layers: expected the name of a self-attention layer, got 'none_of_these'", missing)
    replaced = unet_like(base["sd"])
    replaced.forward = lambda *args, **kwargs: None
    refused(r"^pag_scale: expected 0 because the forward method of UNet2DConditionModel was replaced",
            with_parts(PAGS["sd"], base["sd"], unet=replaced))  # fmt: skip


# Guidance that keeps a deviation


@pytest.mark.parametrize("kind", PAGS)
def test_guidance_rescale(base: dict[str, Any], pags: dict[str, Any], kind: str) -> None:
    options = {**SIZE, "guidance_scale": 5.0, "guidance_rescale": 0.7, "prompt": ["a dog", "a cat"]}
    got, expected = chain_and_pipeline(base[kind], options, batch=2)
    assert relative(got, expected) < FP32
    plain, _ = chain_and_pipeline(base[kind], {**options, "guidance_rescale": 0.0}, batch=2)
    assert relative(plain, expected) > 1e-4
    given = embeddings(base[kind])

    def make(memory: Any, leaf: Any) -> Any:
        return DDIM.from_pipeline(
            base[kind], num_inference_steps=3, guidance_scale=5.0, guidance_rescale=0.7, memory=memory, **SIZE,
            **{**given, "negative_prompt_embeds": leaf},
        )  # fmt: skip

    leaf = given["negative_prompt_embeds"]
    assert_same_gradients(make, [leaf], ["checkpoint", "auto"], make("checkpoint", leaf).noise(seed=1))
    with pytest.raises(
        ValueError, match=r"^guidance_rescale: expected 0 with guidance by three predictions, .* got 0.5"
    ):
        DDIM.from_pipeline(pags[kind], "a dog", guidance_rescale=0.5, **SIZE)
    with pytest.raises(ValueError, match=r"^guidance_rescale: expected a number from 0 to 1, got 2"):
        DDIM.from_pipeline(base[kind], "a dog", guidance_rescale=2.0)


# InstructPix2Pix


@pytest.mark.parametrize("kind", EDITORS)
@pytest.mark.parametrize("options", [
    {"guidance_scale": 4.0, "image_guidance_scale": 2.0, "negative_prompt": "ugly"},
    {"guidance_scale": 4.0},
    {"guidance_scale": 1.0, "image_guidance_scale": 1.0},
])  # fmt: skip
def test_latents_of_an_edit(editors: dict[str, Any], kind: str, options: dict[str, Any]) -> None:
    size = SIZE if kind == "xl" else {}
    got, expected = chain_and_pipeline(editors[kind], {"image": picture(), **options, **size})
    assert got.shape == (1, 4, 8, 8) and relative(got, expected) < FP32
    other, _ = chain_and_pipeline(editors[kind], {"image": picture(seed=1), **options, **size})
    assert relative(other, expected) > 1e-3, "the picture must matter"


def test_an_edit_of_latents_with_the_schedulers_own_steps(editors: dict[str, Any]) -> None:
    made = diffusers.DPMSolverMultistepScheduler.from_config(editors["sd"].scheduler.config)
    pipe = with_parts(EDITORS["sd"], editors["sd"], scheduler=made)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"prompt": ["a dog", "a cat"], "image": latents, "guidance_scale": 4.0}
    got, expected = chain_and_pipeline(pipe, options, solver=DPMSolver, batch=2)
    assert relative(got, expected) < FP32


def test_gradient_of_an_edit(editors: dict[str, Any]) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def make(solver: Any) -> Any:
        return lambda memory, leaf: solver.from_pipeline(
            editors["sd"], "a dog", num_inference_steps=3, guidance_scale=3.0, memory=memory, image=leaf
        )

    x = make(DDIM)("checkpoint", latents).noise(seed=1)
    assert_same_gradients(make(DDIM), [latents], ["checkpoint", "auto"], x)
    assert_same_gradients(make(EDICT), [latents], ["reversible"], x)


def test_what_does_not_fit_an_edit_is_refused(editors: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^image: expected the picture that is edited, got None"):
        DDIM.from_pipeline(editors["sd"], "a dog")
    with pytest.raises(ValueError, match=r"^image_guidance_scale: expected a number of at least 1, got 0.5"):
        DDIM.from_pipeline(editors["sd"], "a dog", image=picture(), image_guidance_scale=0.5)
