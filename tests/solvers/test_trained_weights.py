"""Pipelines whose weights get gradients: attention and norms of a UNet, a ControlNet, rows of a token embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative
from tiny_extras import controlnet, picture, pipelines, unet_like, with_parts
from torch import Tensor

from doodl_fast import EDICT, shapes


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The embedded pipeline in float64, whose weights are trained."""
    return shapes.load_pipeline(dtype=torch.float64)


def gradients(chain: Any, weights: list[Tensor]) -> tuple[Tensor, ...]:
    noise = chain.noise(seed=0, dtype=torch.float64)
    target = torch.linspace(-1, 1, noise.numel(), dtype=torch.float64).view_as(noise)
    return torch.autograd.grad((chain(noise)[0] * target).sum(), weights)


def test_attention_weights_of_a_unet(pipe: Any) -> None:
    weights = [w for name, w in pipe.unet.named_parameters() if "attn2.to_k.weight" in name or "norm1" in name]
    for weight in weights:
        weight.requires_grad_()
    try:
        options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}
        chain = EDICT.from_pipeline(pipe, "a red circle", memory="reversible", trainable=weights, **options)
        got = gradients(chain, weights)
        # Plain PyTorch through diffusers' UNet itself.
        embedding = chain.denoiser.cond, chain.denoiser.uncond
        x = chain.noise(seed=0, dtype=torch.float64)
        state = [x, x]
        for k in chain.program:
            value = k.a * state[k.target] + k.c * state[k.source]
            if k.b:
                both = torch.cat([embedding[1], embedding[0]])
                u, v = pipe.unet(torch.cat([state[k.source]] * 2), k.tag, both).sample.chunk(2)
                value = value + k.b * (u + 3.0 * (v - u))
            state[k.target] = value
        target = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
        for a, b in zip(got, torch.autograd.grad((state[0] * target).sum(), weights), strict=True):
            assert b.abs().max() > 1e-8
            assert relative(a, b) < 1e-10
    finally:
        pipe.unet.requires_grad_(False)


def test_rows_of_the_token_embedding(pipe: Any) -> None:
    """Textual inversion: the gradient reaches the embedding's table through the text encoder."""
    table = pipe.text_encoder.get_input_embeddings().weight.requires_grad_()
    try:
        ids = pipe.tokenizer("a red circle", padding="max_length", return_tensors="pt").input_ids
        found = {}
        for memory in ("reversible", "naive"):
            embeds = pipe.text_encoder(ids)[0]
            options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "memory": memory}
            made = EDICT.from_pipeline(pipe, prompt_embeds=embeds, **options)
            (found[memory],) = gradients(made, [table])
        used = found["naive"].abs().amax(1) > 0
        assert set(used.nonzero().flatten().tolist()) <= set(ids.flatten().tolist()) and used.any()
        assert relative(found["reversible"], found["naive"]) < 1e-10
    finally:
        table.requires_grad_(False)


def test_names_without_requires_grad_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"trainable: expected weights that require grad.*requires_grad_\(True\)"):
        EDICT.from_pipeline(pipe, "a red circle", num_inference_steps=2, trainable=lambda name: "to_k" in name)


def test_a_controlnet(tmp_path: Any) -> None:
    base = pipelines(tmp_path)["sd"]
    net = controlnet(base.unet).double().requires_grad_()
    pipe = with_parts("StableDiffusionControlNetPipeline", base, controlnet=net, unet=unet_like(base).double())
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.double()
    image = picture().double()
    chain = EDICT.from_pipeline(
        pipe,
        "a dog",
        num_inference_steps=3,
        guidance_scale=3.0,
        image=image,
        memory="reversible",
        height=64,
        width=64,
        trainable=lambda name: name.startswith("controlnet"),
    )
    weights = list(chain.denoiser.trainable)
    assert {id(weight) for weight in weights} == {id(weight) for weight in net.parameters()}
    got = torch.autograd.grad(chain(chain.noise(seed=0, dtype=torch.float64))[0].sum(), weights, allow_unused=True)
    x = chain.noise(seed=0, dtype=torch.float64)
    state, both = [x, x], torch.cat([chain.denoiser.uncond, chain.denoiser.cond]).double()
    for k in chain.program:
        value = k.a * state[k.target] + k.c * state[k.source]
        if k.b:
            source = torch.cat([state[k.source]] * 2)
            down, middle = net(source, k.tag, both, torch.cat([image] * 2), return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            u, v = pipe.unet(source, k.tag, both, **added).sample.chunk(2)
            value = value + k.b * (u + 3.0 * (v - u))
        state[k.target] = value
    expected = torch.autograd.grad(state[0].sum(), weights, allow_unused=True)
    assert sum(float(b.abs().max()) > 1e-8 for b in expected if b is not None) > len(weights) // 2
    for a, b in zip(got, expected, strict=True):
        assert (a is None or not a.any()) if b is None else (a - b).norm() <= 1e-10 * max(1.0, float(b.norm()))
