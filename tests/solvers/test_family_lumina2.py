"""Chains of Lumina-Image 2.0 have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import tiny_flows
import torch
from conftest import relative
from family_oracle import check_gradient, check_no_bit_differs, check_pictures, masked_embeddings

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

OPTIONS: dict[str, Any] = {"num_inference_steps": 5, "max_sequence_length": 8}
SIZE = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_flows.lumina2()


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize(
    "guidance",
    [
        {"negative_prompt": "ugly blurred cat"},
        {"guidance_scale": 1.0},
        {"cfg_normalization": False},
        {"cfg_trunc_ratio": 0.5, "guidance_scale": 6.0},
        {"system_prompt": "blurred"},
    ],
)
def test_latents_and_pictures(pipe: Any, solver: Any, guidance: dict[str, Any]) -> None:
    chain = check_pictures(solver, pipe, "a dog", {**OPTIONS, **SIZE, **guidance})
    assert chain.noise().shape == (1, 4, 8, 12)


def test_prompts_of_different_lengths_and_a_shift() -> None:
    pipe = tiny_flows.lumina2(use_dynamic_shifting=True)
    prompts, negatives = ["a dog", "a red dog circle"], ["ugly", "ugly blurred cat"]
    check_pictures(DDIM, pipe, prompts, {**OPTIONS, **SIZE, "negative_prompt": negatives})
    check_pictures(Sampler, pipe, "a dog", {**OPTIONS, **SIZE, "sigmas": [1.0, 0.8, 0.5, 0.2, 0.1]})


def test_truncated_guidance_changes_the_last_steps_alone(pipe: Any) -> None:
    whole, cut, none = (
        DDIM.from_pipeline(pipe, "a dog", **OPTIONS, **guidance)
        for guidance in ({}, {"cfg_trunc_ratio": 0.5}, {"guidance_scale": 1.0})
    )
    x = whole.noise(seed=4)
    with torch.no_grad():
        for step, t in enumerate(cut.schedule.timesteps):
            same, other = (whole, none) if step < 2 else (none, whole)
            assert relative(cut.denoiser(x, t), same.denoiser(x, t)) < 1e-6
            assert relative(cut.denoiser(x, t), other.denoiser(x, t)) > 1e-3


@pytest.mark.parametrize(
    ("solver", "memory", "options"),
    [(DDIM, "checkpoint", {}), (Sampler, "auto", {"cfg_trunc_ratio": 0.5}), (EDICT, "reversible", {})],
)
def test_gradient_is_that_of_plain_autograd(pipe: Any, solver: Any, memory: str, options: dict[str, Any]) -> None:
    given = masked_embeddings(pipe, max_sequence_length=8)
    check_gradient(solver, pipe, memory, given, {"num_inference_steps": 5, **options})


def test_exact_arithmetic_is_undone_to_the_bit(pipe: Any) -> None:
    check_no_bit_differs(EDICT, pipe, "a dog", OPTIONS)


def test_what_does_not_fit_is_refused_or_said(pipe: Any) -> None:
    def make(*args: Any, **options: Any) -> Any:
        return DDIM.from_pipeline(pipe, *args, num_inference_steps=2, **options)

    with pytest.warns(RuntimeWarning, match=r"^negative_prompt: it is not used with guidance_scale=1;") as found:
        make("a dog", "ugly", guidance_scale=1.0)
    assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("a dog", max_sequence_length=8)
    with pytest.raises(ValueError, match=r"^max_sequence_length: expected at most 39, for which the network has posi"):
        make("a dog", max_sequence_length=64)
    with pytest.raises(ValueError, match=r"^prompt_embeds: expected at most 39 tokens, for which .* got 50"):
        make(prompt_embeds=torch.zeros(1, 50, 16), prompt_attention_mask=torch.ones(1, 50))
    with pytest.raises(ValueError, match=r"width: expected a positive multiple of 4 .* patch of 2\), got 18"):
        make("a dog", width=18)
    with pytest.raises(ValueError, match=r"height: expected at most 64, for which the network has positions, got 68"):
        make("a dog", height=68)
    with pytest.raises(TypeError, match=r"^eta: from_pipeline has no such argument for Lumina2Pipeline"):
        make("a dog", eta=1.0)
    other = tiny_flows.lumina2()
    other.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with pytest.raises(TypeError, match=r"^scheduler: expected one of flow matching .* got DDIMScheduler"):
        DDIM.from_pipeline(other, "a dog")
