"""Chains of AuraFlow have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import tiny_flows
from family_oracle import check_gradient, check_no_bit_differs, check_pictures

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

OPTIONS: dict[str, Any] = {"num_inference_steps": 5, "max_sequence_length": 8}
SIZE = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_flows.aura_flow()


def embeddings(pipe: Any) -> dict[str, Any]:
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    made = pipe.encode_prompt("a dog", "ugly cat", device="cpu", max_sequence_length=8)
    given = dict(zip(names, made, strict=True))
    return {
        name: value.reshape(*value.shape[:1], 8, -1)[..., 0] if "mask" in name else value
        for name, value in given.items()
    }


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize("guidance", [{"guidance_scale": 3.0, "negative_prompt": "ugly"}, {"guidance_scale": 1.0}, {}])
def test_latents_and_pictures(pipe: Any, solver: Any, guidance: dict[str, Any]) -> None:
    chain = check_pictures(solver, pipe, "a dog", {**OPTIONS, **SIZE, **guidance})
    assert chain.noise().shape == (1, 4, 8, 12)


def test_a_batch_of_prompts_and_given_sigmas(pipe: Any) -> None:
    prompts, negatives = ["a dog", "a circle"], ["ugly", "blurred"]
    check_pictures(Sampler, pipe, prompts, {**OPTIONS, **SIZE, "negative_prompt": negatives})
    check_pictures(DDIM, pipe, "a dog", {**OPTIONS, **SIZE, "sigmas": [1.0, 0.8, 0.5, 0.2, 0.1]})


@pytest.mark.parametrize(("solver", "memory"), [(DDIM, "checkpoint"), (Sampler, "auto"), (EDICT, "reversible")])
def test_gradient_is_that_of_plain_autograd(pipe: Any, solver: Any, memory: str) -> None:
    check_gradient(solver, pipe, memory, embeddings(pipe), {"num_inference_steps": 5})


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
        make("a dog")
    with pytest.raises(ValueError, match=r"width: expected a positive multiple of 4 .* patch of 2\), got 18"):
        make("a dog", width=18)
    with pytest.raises(ValueError, match=r"height: expected at most 32, for which the network has positions, got 36"):
        make("a dog", height=36)
    with pytest.raises(TypeError, match=r"^prompt_2: from_pipeline has no such argument for AuraFlowPipeline"):
        make("a dog", prompt_2="a cat")
    with pytest.raises(ValueError, match=r"^prompt_attention_mask: expected a tensor because prompt_embeds is given"):
        make(prompt_embeds=embeddings(pipe)["prompt_embeds"])
    other = tiny_flows.aura_flow()
    other.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with pytest.raises(TypeError, match=r"^scheduler: expected one of flow matching .* got DDIMScheduler"):
        DDIM.from_pipeline(other, "a dog")
