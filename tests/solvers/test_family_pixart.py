"""Chains of PixArt pipelines have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from conftest import relative

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

STEPS = 4
OPTIONS: dict[str, Any] = {"num_inference_steps": STEPS, "max_sequence_length": 8, "clean_caption": False}
KINDS = {"sigma": ("PixArtSigmaPipeline", False), "alpha": ("PixArtAlphaPipeline", True)}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    made = {name: tiny_families.pixart(*kind) for name, kind in KINDS.items()}
    # The pipeline of alpha tells its network the size where this is 128.
    made["alpha"].transformer.register_to_config(sample_size=128)
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def embeddings(pipe: Any) -> dict[str, Any]:
    cond, mask, uncond, negative_mask = pipe.encode_prompt(
        "a dog", True, negative_prompt="ugly", device="cpu", max_sequence_length=8
    )
    given = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
    return {
        **{name: value.detach().clone().requires_grad_() for name, value in given.items()},
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": negative_mask,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize(("guidance_scale", "negative"), [(3.0, "ugly"), (1.0, "")])
@pytest.mark.filterwarnings("ignore:height, width")
def test_latents_and_pictures(
    pipes: dict[str, Any], kind: str, solver: Any, guidance_scale: float, negative: str
) -> None:
    pipe = pipes[kind]
    options = {**OPTIONS, "height": 16, "width": 24, "guidance_scale": guidance_scale, "negative_prompt": negative}
    chain = solver.from_pipeline(pipe, "a dog", memory="checkpoint", **options)
    other = solver.from_pipeline(pipe, "a cat", memory="checkpoint", **options)
    x = chain.noise(seed=3)
    assert x.shape == (1, 4, 8, 12)
    options |= {"latents": x, "use_resolution_binning": False}
    expected = pipe("a dog", output_type="latent", **options).images
    with torch.no_grad():
        (x0,) = chain(x)
        images = (chain.decode(x0) + 1) / 2
        assert relative(other(x)[0], expected) > 1e-3, "the prompt must matter"
    assert relative(x, expected) > 0.1, "the weights must matter"
    assert relative(x0, expected) < 1e-5
    assert relative(images.clamp(0, 1), pipe("a dog", output_type="pt", **options).images) < 1e-5


def test_a_batch_of_prompts(pipes: dict[str, Any]) -> None:
    pipe, prompts, negatives = pipes["sigma"], ["a dog", "a red cat"], ["ugly", "blurred"]
    chain = DDIM.from_pipeline(pipe, prompts, negatives, memory="checkpoint", **OPTIONS)
    x = chain.noise(seed=5)
    options = {**OPTIONS, "latents": x, "use_resolution_binning": False, "output_type": "latent"}
    expected = pipe(prompts, negative_prompt=negatives, **options).images
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5, "the default guidance scale is the pipeline's"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (EDICT, "reversible")])
@pytest.mark.filterwarnings("ignore:height, width")
def test_gradient_is_that_of_plain_autograd(pipes: dict[str, Any], kind: str, solver: Any, memory: str) -> None:
    gradients = []
    for mode in ("naive", memory):
        given = embeddings(pipes[kind])
        size = {"height": 16, "width": 24} if kind == "alpha" else {}
        chain = solver.from_pipeline(pipes[kind], num_inference_steps=STEPS, memory=mode, **size, **given)
        x = chain.noise(seed=1).requires_grad_()
        loss = chain.decode(chain(x)[0]).square().mean()
        leaves = [x, given["prompt_embeds"], given["negative_prompt_embeds"]]
        gradients.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-5


def test_what_does_not_fit_is_refused_or_said(pipes: dict[str, Any]) -> None:
    pipe = pipes["sigma"]
    with pytest.warns(RuntimeWarning, match=r"^height, width: 32 x 16 is used as it is; the pipeline's use_resolution"):
        DDIM.from_pipeline(pipe, "a dog", height=32, **OPTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "height, width")
        with pytest.raises(ValueError, match=r"height: expected a positive multiple of 4 .* patch of 2\), got 18"):
            DDIM.from_pipeline(pipe, "a dog", height=18)
        told = DDIM.from_pipeline(pipes["alpha"], "a dog", height=16, width=16, **OPTIONS)
        with pytest.raises(
            ValueError, match=r"height: expected 16, the size that this chain's conditions tell the net"
        ):
            told.noise(height=32)
    with pytest.raises(TypeError, match=r"^use_resolution_binning: from_pipeline has no such argument for PixArtSigma"):
        DDIM.from_pipeline(pipe, "a dog", use_resolution_binning=True)
    given = embeddings(pipe)
    with pytest.raises(ValueError, match=r"^prompt_attention_mask: expected a tensor because prompt_embeds is given"):
        DDIM.from_pipeline(pipe, prompt_embeds=given["prompt_embeds"])
    flow = tiny_families.pixart()
    flow.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TypeError, match=r"^scheduler: FlowMatchEuler.* not right for pipelines of the family PixArt"):
        DDIM.from_pipeline(flow, "a dog")
