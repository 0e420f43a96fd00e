"""With T2I-Adapters and IP-Adapters a chain has the pipeline's own latents and the gradient of naive autograd."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from conftest import relative
from PIL import Image
from tiny_extras import (
    assert_same_gradients,
    chain_and_pipeline,
    controlnet,
    ip_adapter,
    picture,
    pipelines,
    t2i_adapter,
    unet_like,
    with_parts,
    with_t2i_adapter,
)
from tolerances import FP32
from torch import Tensor

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

KINDS = ("sd", "xl")


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pipelines(tmp_path_factory.mktemp("pipes"))


@pytest.fixture(scope="module")
def adapted(pipes: dict[str, Any]) -> dict[str, Any]:
    return {kind: with_t2i_adapter(pipe, kind) for kind, pipe in pipes.items()}


def vision_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture(scope="module")
def prompted(pipes: dict[str, Any]) -> dict[str, Any]:
    """Pipelines with two IP-Adapters."""
    from transformers import CLIPImageProcessor

    made = {}
    for kind, pipe in pipes.items():
        unet = unet_like(pipe)
        unet.load_state_dict(pipe.unet.state_dict())
        unet._load_ip_adapter_weights([ip_adapter(unet, seed=0), ip_adapter(unet, seed=1)])
        eyes = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        kinds = {"sd": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}
        made[kind] = with_parts(
            kinds[kind], pipe, unet=unet.requires_grad_(False), image_encoder=vision_encoder(), feature_extractor=eyes
        )
        made[kind].set_ip_adapter_scale([0.8, 0.4])
    return made


# T2I-Adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_latents_with_a_t2i_adapter(adapted: dict[str, Any], kind: str, guidance_scale: float) -> None:
    options = {"image": picture(), "guidance_scale": guidance_scale, "adapter_conditioning_scale": 0.8}
    got, expected = chain_and_pipeline(adapted[kind], options)
    assert got.shape == (1, 4, 8, 8) and relative(got, expected) < FP32
    assert relative(chain_and_pipeline(adapted[kind], {**options, "image": picture(seed=1)})[0], expected) > 1e-3


@pytest.mark.parametrize("solver", [DDIM, Sampler])
def test_the_adapter_acts_in_a_part_of_the_steps(adapted: dict[str, Any], solver: Any) -> None:
    options = {"image": picture(), "guidance_scale": 3.0, "adapter_conditioning_factor": 0.5}
    got, expected = chain_and_pipeline(adapted["xl"], options, solver=solver)
    assert relative(got, expected) < FP32
    whole, _ = chain_and_pipeline(adapted["xl"], {**options, "adapter_conditioning_factor": 1.0}, solver=solver)
    assert relative(whole, expected) > 1e-3


def test_several_t2i_adapters_a_batch_and_pil_pictures(pipes: dict[str, Any]) -> None:
    pipe = with_t2i_adapter(pipes["sd"], adapter=diffusers.MultiAdapter([t2i_adapter(), t2i_adapter(seed=1)]))
    drawn = [Image.effect_noise((70, 64), 80).convert("RGB"), Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 9)]
    rows = [[drawn[0], drawn[1].convert("RGB")], [drawn[1].convert("RGB"), drawn[0]]]
    options = {
        "prompt": ["a dog", "a cat"], "image": rows, "guidance_scale": 3.0, "height": 64, "width": 64,
        "adapter_conditioning_scale": [0.7, 0.2],
    }  # fmt: skip
    got, expected = chain_and_pipeline(pipe, options, batch=2)
    assert relative(got, expected) < FP32


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_picture_that_a_t2i_adapter_reads(adapted: dict[str, Any], kind: str) -> None:
    def make(solver: Any, factor: float) -> Any:
        return lambda memory, hint: solver.from_pipeline(
            adapted[kind], "a dog", num_inference_steps=3, guidance_scale=3.0, memory=memory, image=hint,
            adapter_conditioning_factor=factor,
        )  # fmt: skip

    x = make(DDIM, 1.0)("checkpoint", picture()).noise(seed=1)
    assert_same_gradients(make(DDIM, 1.0), [picture()], ["checkpoint", "auto"], x)
    assert_same_gradients(make(EDICT, 0.7), [picture()], ["reversible"], x)
    frozen = make(DDIM, 0.7)("checkpoint", picture())
    start = x.clone().requires_grad_()
    assert torch.autograd.grad(frozen(start)[0].sum(), start)[0].norm() > 0


def test_what_does_not_fit_a_t2i_adapter_is_refused(adapted: dict[str, Any], pipes: dict[str, Any]) -> None:
    def refused(kind: type[Exception], match: str, pipe: Any = adapted["sd"], **options: Any) -> None:
        with pytest.raises(kind, match=match):
            DDIM.from_pipeline(pipe, "a dog", num_inference_steps=4, **options)

    refused(TypeError, "^image: expected the picture that the T2I-Adapter reads, got None")
    refused(TypeError, "^image: expected tensors or PIL pictures, got str", image=["a"], height=64, width=64)
    refused(ValueError, "^adapter_conditioning_factor: expected a fraction of the steps from 0 to 1, got 2",
            image=picture(), adapter_conditioning_factor=2.0)  # fmt: skip
    several = with_t2i_adapter(pipes["sd"], adapter=diffusers.MultiAdapter([t2i_adapter(), t2i_adapter(seed=1)]))
    refused(ValueError, "^image: expected a list of 2 pictures, one for each T2I-Adapter, got Tensor", several,
            image=picture())  # fmt: skip


# IP-Adapters


def embeds(pipe: Any, guided: bool, seed: int = 0) -> list[Tensor]:
    pictures = [picture(height=32, width=32, seed=seed), picture(height=32, width=32, seed=seed + 1)]
    with torch.no_grad():
        made: list[Tensor] = pipe.prepare_ip_adapter_image_embeds(pictures, None, "cpu", 1, guided)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
@pytest.mark.parametrize("given", ["pictures", "embeds"])
def test_latents_with_ip_adapters(prompted: dict[str, Any], kind: str, guidance_scale: float, given: str) -> None:
    def options(seed: int) -> dict[str, Any]:
        pictures = [picture(height=32, width=32, seed=seed), picture(height=32, width=32, seed=seed + 1)]
        own: dict[str, Any] = {"ip_adapter_image": pictures}
        if given == "embeds":
            own = {"ip_adapter_image_embeds": embeds(prompted[kind], guidance_scale > 1, seed)}
        return {"guidance_scale": guidance_scale, "height": 64, "width": 64, **own}

    got, expected = chain_and_pipeline(prompted[kind], options(0))
    assert relative(got, expected) < FP32
    assert relative(chain_and_pipeline(prompted[kind], options(5))[0], expected) > 1e-3, "the picture must matter"


def test_masks_and_a_batch_with_ip_adapters(prompted: dict[str, Any]) -> None:
    half = torch.zeros(1, 1, 64, 64)
    half[..., :32] = 1
    options = {
        "prompt": ["a dog", "a cat"], "guidance_scale": 3.0, "height": 64, "width": 64,
        "ip_adapter_image_embeds": embeds(prompted["sd"], True),
    }  # fmt: skip
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [half, 1 - half]}}
    got, expected = chain_and_pipeline(prompted["sd"], {**options, **masks}, batch=2)
    assert relative(got, expected) < FP32
    assert relative(chain_and_pipeline(prompted["sd"], options, batch=2)[0], expected) > 1e-3


def test_an_ip_adapter_with_a_controlnet(prompted: dict[str, Any], pipes: dict[str, Any]) -> None:
    kind = "StableDiffusionXLControlNetPipeline"
    pipe = with_parts(kind, prompted["xl"], controlnet=controlnet(pipes["xl"].unet))
    options = {"image": picture(), "guidance_scale": 3.0, "height": 64, "width": 64}
    options["ip_adapter_image_embeds"] = embeds(prompted["xl"], True)
    got, expected = chain_and_pipeline(pipe, options)
    assert relative(got, expected) < FP32


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_embeddings_of_pictures(prompted: dict[str, Any], kind: str) -> None:
    def make(solver: Any) -> Any:
        return lambda memory, *given: solver.from_pipeline(
            prompted[kind], "a dog", num_inference_steps=3, guidance_scale=3.0, memory=memory, height=64, width=64,
            ip_adapter_image_embeds=list(given),
        )  # fmt: skip

    given = embeds(prompted[kind], True)
    x = make(DDIM)("checkpoint", *given).noise(seed=1)
    assert_same_gradients(make(DDIM), given, ["checkpoint", "auto"], x)
    assert_same_gradients(make(EDICT), given, ["reversible"], x)


def test_what_does_not_fit_an_ip_adapter_is_refused(prompted: dict[str, Any]) -> None:
    def refused(match: str, pipe: Any = prompted["sd"], **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            DDIM.from_pipeline(pipe, "a dog", num_inference_steps=4, **options)

    given = embeds(prompted["sd"], False)
    refused("^ip_adapter_image: the pipeline's UNet has an IP-Adapter, so expected one of .*, got none")
    refused("^ip_adapter_image: .*, got several", ip_adapter_image=picture(), ip_adapter_image_embeds=given)
    refused("^ip_adapter_image: expected pictures that do not require grad, because they are encoded once",
            ip_adapter_image=[picture().requires_grad_(), picture()])  # fmt: skip
    refused("^ip_adapter_image_embeds: expected a list of 2 tensors, one for each IP-Adapter",
            ip_adapter_image_embeds=given[:1])  # fmt: skip
    blind = with_parts("StableDiffusionPipeline", prompted["sd"], image_encoder=None)
    refused("^ip_adapter_image: StableDiffusionPipeline has no image_encoder; pass ip_adapter_image_embeds", blind,
            ip_adapter_image=picture())  # fmt: skip
    with pytest.raises(TypeError, match=r"^ip_adapter_image: from_pipeline has no such argument"):
        DDIM.from_pipeline(
            with_parts("StableDiffusionPipeline", blind, unet=unet_like(blind, encoder_hid_dim_type=None)), "a dog",
            ip_adapter_image=picture(),
        )  # fmt: skip
