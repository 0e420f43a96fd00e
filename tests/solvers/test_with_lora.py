"""LoRA adapters, textual inversions, weighted prompts and clip_skip count as they do in the pipeline."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipeline
import torch
from conftest import relative
from tiny_extras import assert_same_gradients, chain_and_pipeline, picture, pipelines, unet_like, with_parts
from tolerances import FP32
from torch import Tensor

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT

KINDS = {"sd": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}
SIZE: dict[str, Any] = {"height": 64, "width": 64, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pipelines(tmp_path_factory.mktemp("pipes"))


def add_lora(network: Any, name: str, seed: int, targets: tuple[str, ...]) -> None:
    """Adds a LoRA adapter with random weights; in a new one half of them are zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets))
    if hasattr(network, "attn_processors"):
        network.add_adapter(config, name)
    else:  # This transformers asks for a newer peft than there may be.
        peft.inject_adapter_in_model(config, network, name)
    generator = torch.Generator().manual_seed(seed)
    for key, weight in network.named_parameters():
        if "lora_" in key and f".{name}." in key:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    network.requires_grad_(False)


@pytest.fixture(scope="module")
def adapted(base: dict[str, Any]) -> dict[str, Any]:
    """Pipelines whose UNet has two LoRA adapters."""
    made = {}
    for kind, pipe in base.items():
        made[kind] = with_parts(KINDS[kind], pipe, unet=unet_like(pipe))
        for number, name in enumerate(("one", "two")):
            add_lora(made[kind].unet, name, number, ("to_q", "to_k", "to_v", "to_out.0"))
        made[kind].set_adapters(["one", "two"], [0.8, 0.5])
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_latents_with_lora_adapters(adapted: dict[str, Any], base: dict[str, Any], kind: str) -> None:
    pipe = adapted[kind]
    plain, _ = chain_and_pipeline(with_parts(KINDS[kind], base[kind], unet=unet_like(base[kind])), SIZE)
    for names in (["one"], ["two"], ["one", "two"]):
        pipe.set_adapters(names, [0.8, 0.5][: len(names)])
        got, expected = chain_and_pipeline(pipe, SIZE)
        assert relative(got, expected) < FP32 and relative(plain, expected) > 1e-3
    scaled, asked = chain_and_pipeline(pipe, {**SIZE, "cross_attention_kwargs": {"scale": 0.3}})
    assert relative(scaled, asked) < FP32 and relative(asked, expected) > 1e-3


def test_latents_with_an_adapter_in_the_text_encoder(base: dict[str, Any], tmp_path: Path) -> None:
    pipe = with_parts(KINDS["sd"], tiny_pipeline.stable_diffusion(tmp_path), unet=unet_like(base["sd"]))
    add_lora(pipe.unet, "one", 0, ("to_q", "to_v"))
    add_lora(pipe.text_encoder, "one", 1, ("q_proj", "v_proj"))
    options = {**SIZE, "cross_attention_kwargs": {"scale": 0.4}}
    got, expected = chain_and_pipeline(pipe, options)
    assert relative(got, expected) < FP32
    conds = [DDIM.from_pipeline(pipe, "a dog", **given).denoiser.cond for given in (SIZE, options)]
    assert relative(*conds) > 1e-3, "the scale must reach the text encoder"


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_with_lora_adapters(adapted: dict[str, Any], kind: str) -> None:
    pipe = adapted[kind]
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = pipe.encode_prompt("a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    given = dict(zip(names, encoded, strict=False))

    def make(solver: Any, **options: Any) -> Any:
        return lambda memory, leaf: solver.from_pipeline(
            pipe, num_inference_steps=3, memory=memory, **SIZE, cross_attention_kwargs={"scale": 0.3},
            **{**given, "prompt_embeds": leaf}, **options,
        )  # fmt: skip

    leaf = given["prompt_embeds"]
    x = make(DDIM)("checkpoint", leaf).noise(seed=1)
    assert_same_gradients(make(DDIM), [leaf], ["checkpoint", "auto"], x)
    assert_same_gradients(make(EDICT), [leaf], ["reversible"], x)
    if kind == "sd":
        start = x.clone().requires_grad_()
        wide, narrow = (make(DDIM, vjp_dtype=dtype)("checkpoint", leaf) for dtype in (torch.float64, None))
        found = [torch.autograd.grad(chain(start)[0].square().mean(), start)[0] for chain in (wide, narrow)]
        assert relative(*found) < FP32, "copies with cast weights have the adapters too"


def through(denoiser: Denoiser, x: Tensor) -> Tensor:
    """The gradient of one evaluation."""
    leaf = x.clone().requires_grad_()
    with denoiser.running():
        return torch.autograd.grad(denoiser(leaf, 500).square().mean(), leaf)[0]


def test_blocks_that_are_computed_again_have_the_scale(adapted: dict[str, Any]) -> None:
    pipe = adapted["sd"]
    chain = DDIM.from_pipeline(pipe, "a dog", **SIZE, cross_attention_kwargs={"scale": 0.3})
    x, blocks = chain.noise(seed=1), chain.denoiser.for_blocks()
    assert blocks is not None
    assert relative(through(blocks, x), through(chain.denoiser, x)) < FP32
    by_hand = Denoiser(pipe.unet, chain.denoiser.cond, cross_attention_kwargs={"scale": 0.3})
    assert by_hand.for_blocks() is None, "diffusers has taken the scale back when a block is computed again"
    assert Denoiser(pipe.unet, chain.denoiser.cond).for_blocks() is not None


def test_scales_in_threads_do_not_meet_and_the_pipeline_keeps_its_own(adapted: dict[str, Any]) -> None:
    pipe = adapted["sd"]
    before = {name: dict(m.scaling) for name, m in pipe.unet.named_modules() if hasattr(m, "scale_layer")}
    chains = [
        DDIM.from_pipeline(pipe, "a dog", num_inference_steps=3, **SIZE, cross_attention_kwargs={"scale": scale})
        for scale in (0.3, 1.7)
    ]
    x = chains[0].noise(seed=1)
    with torch.no_grad():
        expected = [chain(x)[0] for chain in chains]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] += [chains[number](x)[0] for _ in range(4)]

    threads = [threading.Thread(target=run, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(end, expected[number]) for number, ends in found.items() for end in ends)
    after = {name: dict(m.scaling) for name, m in pipe.unet.named_modules() if hasattr(m, "scale_layer")}
    assert before and after == before


def test_a_lora_adapter_with_pag_and_an_inpainting_mask(base: dict[str, Any], adapted: dict[str, Any]) -> None:
    pag = with_parts("StableDiffusionPAGPipeline", base["sd"], unet=adapted["sd"].unet)
    options = {**SIZE, "cross_attention_kwargs": {"scale": 0.3}}
    got, expected = chain_and_pipeline(pag, options)
    assert relative(got, expected) < FP32
    editor = with_parts("StableDiffusionInstructPix2PixPipeline", base["sd"], unet=unet_like(base["sd"], in_channels=8))
    add_lora(editor.unet, "one", 0, ("to_q", "to_v"))
    given = {"image": picture(), "guidance_scale": 3.0, "cross_attention_kwargs": {"scale": 0.3}}
    got, expected = chain_and_pipeline(editor, given)
    assert relative(got, expected) < FP32


# Prompts


def test_a_textual_inversion(base: dict[str, Any], tmp_path: Path) -> None:
    pipe = with_parts(KINDS["sd"], tiny_pipeline.stable_diffusion(tmp_path))
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<it>": vectors}, token="<it>")
    got, expected = chain_and_pipeline(pipe, {**SIZE, "prompt": "a <it> dog"})
    assert relative(got, expected) < FP32
    conds = [DDIM.from_pipeline(pipe, prompt).denoiser.cond for prompt in ("a <it> dog", "a dog")]
    assert relative(*conds) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_prompts_by_their_embeddings(base: dict[str, Any], kind: str) -> None:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = base[kind].encode_prompt("a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    given = dict(zip(names, encoded, strict=False))
    weights = torch.ones(1, 77, 1)
    weights[:, 1:20] = 4
    weighted = {**given, "prompt_embeds": given["prompt_embeds"] * weights}
    got, expected = chain_and_pipeline(base[kind], {**SIZE, "prompt": None, **weighted})
    assert relative(got, expected) < FP32
    assert relative(chain_and_pipeline(base[kind], {**SIZE, "prompt": None, **given})[0], expected) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_clip_skip(kind: str, base: dict[str, Any]) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = base[kind].tokenizer
    torch.manual_seed(0)
    config = CLIPTextConfig(**tiny_pipeline.text_settings(words, num_hidden_layers=4))
    parts = {"text_encoder": CLIPTextModel(config).eval()}
    if kind == "xl":
        parts["text_encoder_2"] = CLIPTextModelWithProjection(config).eval()
    for encoder in parts.values():
        if not hasattr(encoder, "text_model"):  # diffusers looks for it, and newer versions of transformers lack it.
            vars(encoder)["text_model"] = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    pipe = with_parts(KINDS[kind], base[kind], **parts)
    got, expected = chain_and_pipeline(pipe, {**SIZE, "clip_skip": 2})
    assert relative(got, expected) < FP32
    assert relative(chain_and_pipeline(pipe, SIZE)[0], expected) > 1e-3
