"""Chains of Sana have the pipeline's own latents and pictures, and the gradient of naive autograd."""

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

OPTIONS: dict[str, Any] = {"num_inference_steps": 5, "max_sequence_length": 8, "complex_human_instruction": None}
SIZE = {"height": 32, "width": 64}
WHOLE = {"use_resolution_binning": False}
pytestmark = pytest.mark.filterwarnings("ignore:height, width")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_flows.sana()


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize("guidance", [{"guidance_scale": 3.0, "negative_prompt": "ugly"}, {"guidance_scale": 1.0}, {}])
def test_latents_and_pictures(pipe: Any, solver: Any, guidance: dict[str, Any]) -> None:
    chain = check_pictures(solver, pipe, "a dog", {**OPTIONS, **SIZE, **guidance}, pipeline_only=WHOLE)
    assert chain.noise().shape == (1, 4, 16, 32)


def test_its_own_scheduler_is_followed_by_the_sampler() -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe = tiny_flows.sana(diffusers.DPMSolverMultistepScheduler(**flow))
    check_pictures(Sampler, pipe, "a dog", {**OPTIONS, **SIZE}, pipeline_only=WHOLE)
    check_gradient(Sampler, pipe, "auto", masked_embeddings(pipe, max_sequence_length=8), {"num_inference_steps": 5})
    with pytest.raises(ValueError, match=r"^scheduler: DPMSolverMultistepScheduler has use_flow_sigmas=True"):
        DDIM.from_pipeline(pipe, "a dog", **OPTIONS)


def test_a_batch_of_prompts_and_the_instruction_of_the_pipeline(pipe: Any) -> None:
    options = {name: value for name, value in OPTIONS.items() if name != "complex_human_instruction"}
    prompts, negatives = ["a dog", "a circle"], ["ugly", "blurred"]
    check_pictures(Sampler, pipe, prompts, {**options, **SIZE, "negative_prompt": negatives}, pipeline_only=WHOLE)
    told, alone = (DDIM.from_pipeline(pipe, "a dog", **kind) for kind in (options, OPTIONS))
    assert relative(told.denoiser.cond, alone.denoiser.cond) > 1e-2


@pytest.mark.parametrize(("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (EDICT, "reversible")])
def test_gradient_is_that_of_plain_autograd(pipe: Any, solver: Any, memory: str) -> None:
    given = masked_embeddings(pipe, max_sequence_length=8)
    check_gradient(solver, pipe, memory, given, {"num_inference_steps": 5})


def test_exact_arithmetic_is_undone_to_the_bit(pipe: Any) -> None:
    check_no_bit_differs(EDICT, pipe, "a dog", OPTIONS)


def test_pictures_are_encoded_and_decoded(pipe: Any) -> None:
    decode = DDIM.from_pipeline(pipe, "a dog", **OPTIONS).decode
    images = torch.rand(2, 3, 8, 16) * 2 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(images).latent
        assert relative(decode.encode(images), raw * pipe.vae.config.scaling_factor) < 1e-6
        assert relative(decode(raw * pipe.vae.config.scaling_factor), pipe.vae.decode(raw).sample) < 1e-5


def test_what_does_not_fit_is_refused_or_said(pipe: Any) -> None:
    with pytest.warns(RuntimeWarning, match=r"^height, width: 32 x 64 is used as it is; the pipeline's use_resol") as w:
        DDIM.from_pipeline(pipe, "a dog", **OPTIONS, **SIZE)
    assert [one.filename for one in w] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDIM.from_pipeline(pipe, "a dog", **OPTIONS)
    with pytest.raises(
        ValueError, match=r"width: expected a positive multiple of 2 \(the VAE's scale factor\), got 17"
    ):
        DDIM.from_pipeline(pipe, "a dog", width=17, **OPTIONS)
    with pytest.raises(
        TypeError, match=r"^use_resolution_binning: from_pipeline has no such argument for SanaPipeline"
    ):
        DDIM.from_pipeline(pipe, "a dog", **WHOLE)
    given = masked_embeddings(pipe, max_sequence_length=8)
    with pytest.raises(ValueError, match=r"^prompt_attention_mask: expected a tensor because prompt_embeds is given"):
        DDIM.from_pipeline(pipe, prompt_embeds=given["prompt_embeds"])
    short = {"prompt_embeds": given["prompt_embeds"], "prompt_attention_mask": given["prompt_attention_mask"][:, :5]}
    with pytest.raises(ValueError, match=r"^prompt_attention_mask: expected shape \(1, 8\), .* got \(1, 5\)"):
        DDIM.from_pipeline(pipe, **short)
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        DDIM.from_pipeline(pipe, "a dog", ["ugly", "blurred"])
    with pytest.raises(TypeError, match=r"^scheduler: expected one of flow matching .* got DDIMScheduler"):
        DDIM.from_pipeline(tiny_flows.sana(diffusers.DDIMScheduler(clip_sample=False)), "a dog")
    sprint = diffusers.SanaSprintPipeline(**pipe.components)
    with pytest.raises(TypeError, match=r"^pipe: from_pipeline does not know SanaSprintPipeline; expected one of"):
        DDIM.from_pipeline(sprint, "a dog")
    other = tiny_flows.sana()
    other.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match=r"^pipe: expected a transformer with guidance_embeds=False, got True"):
        DDIM.from_pipeline(other, "a dog")
