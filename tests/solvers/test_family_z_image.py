"""Chains of Z-Image have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import tiny_flows
import torch
from conftest import relative
from family_oracle import check_no_bit_differs, check_pictures

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

OPTIONS: dict[str, Any] = {"num_inference_steps": 5, "max_sequence_length": 16, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_flows.z_image()


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_scale": 3.0, "negative_prompt": "ugly blurred cat"},
        {"guidance_scale": 0.0},
        {},
        {"cfg_normalization": 1.0},
        {"cfg_truncation": 0.5},
    ],
)
def test_latents_and_pictures(pipe: Any, solver: Any, guidance: dict[str, Any]) -> None:
    chain = check_pictures(solver, pipe, "a dog", {**OPTIONS, **guidance})
    assert chain.noise().shape == (1, 4, 8, 12)


def test_prompts_of_different_lengths_and_a_shift() -> None:
    pipe = tiny_flows.z_image(use_dynamic_shifting=True)
    prompts, negatives = ["a dog", "a red dog blurred circle"], ["ugly", "blurred ugly cat"]
    check_pictures(DDIM, pipe, prompts, {**OPTIONS, "negative_prompt": negatives})
    chain = DDIM.from_pipeline(pipe, "a dog", **OPTIONS)
    with pytest.raises(ValueError, match=r"height: expected 16, the size that this chain's schedule is for \(use_dyna"):
        chain.noise(height=32)


def test_the_norm_of_the_guided_prediction_is_bounded(pipe: Any) -> None:
    bound, alone = (
        DDIM.from_pipeline(pipe, "a dog", **OPTIONS, **guidance)
        for guidance in ({"cfg_normalization": 0.9}, {"guidance_scale": 0.0})
    )
    x = bound.noise(seed=4)
    with torch.no_grad():
        guided, cond = bound.denoiser(x, 500), alone.denoiser(x, 500)
    assert abs(guided.norm() / cond.norm() - 0.9) < 1e-5


@pytest.mark.parametrize(
    ("solver", "memory", "options"),
    [(DDIM, "checkpoint", {}), (Sampler, "auto", {"cfg_normalization": 1.0}), (EDICT, "reversible", {})],
)
def test_gradient_is_that_of_plain_autograd(pipe: Any, solver: Any, memory: str, options: dict[str, Any]) -> None:
    texts, found = {"prompt_embeds": ["a dog", "a red circle"], "negative_prompt_embeds": ["ugly", "cat"]}, []
    for mode in ("naive", memory):
        given = {
            name: [
                states.detach().clone().requires_grad_()
                for states in pipe.encode_prompt(list(prompts), "cpu", False, max_sequence_length=16)[0]
            ]
            for name, prompts in texts.items()
        }
        own = {name: value for name, value in OPTIONS.items() if name != "max_sequence_length"}
        chain = solver.from_pipeline(pipe, memory=mode, **own, **options, **given)
        x = chain.noise(seed=1).requires_grad_()
        loss = chain.decode(chain(x)[0]).square().mean()
        found.append(torch.autograd.grad(loss, [x, *given["prompt_embeds"], *given["negative_prompt_embeds"]]))
    for got, want in zip(found[1], found[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-5


def test_exact_arithmetic_is_undone_to_the_bit(pipe: Any) -> None:
    check_no_bit_differs(EDICT, pipe, "a dog", OPTIONS)


def test_what_does_not_fit_is_refused_or_said(pipe: Any) -> None:
    def make(*args: Any, **options: Any) -> Any:
        return DDIM.from_pipeline(pipe, *args, **{"num_inference_steps": 2, "height": 16, "width": 16, **options})

    with pytest.warns(RuntimeWarning, match=r"^negative_prompt: it is not used with guidance_scale=1;") as found:
        make("a dog", "ugly", guidance_scale=1.0)
    assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("a dog")
    with pytest.raises(ValueError, match=r"width: expected a positive multiple of 4 .* patch of 2\), got 18"):
        make("a dog", width=18)
    with pytest.raises(ValueError, match=r"height: expected at most 128, for which the network has positions, got 256"):
        make("a dog", height=256)
    with pytest.raises(TypeError, match=r"^eta: from_pipeline has no such argument for ZImagePipeline"):
        make("a dog", eta=1.0)
    with pytest.raises(TypeError, match=r"^prompt_embeds: expected a list of tensors \(tokens, features\), got Tensor"):
        make(prompt_embeds=torch.zeros(4, 16), guidance_scale=0.0)
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        make("a dog", ["ugly", "blurred"])
    other = tiny_flows.z_image()
    other.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with pytest.raises(TypeError, match=r"^scheduler: expected one of flow matching .* got DDIMScheduler"):
        DDIM.from_pipeline(other, "a dog")
