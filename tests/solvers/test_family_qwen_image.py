"""Chains of Qwen-Image have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import tiny_flows
import torch
from conftest import relative
from family_oracle import check_gradient, check_no_bit_differs, check_pictures

from doodl_fast.diffusion.families.flux import pack
from doodl_fast.solvers.bdia import BDIA
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.obelm import OBELM
from doodl_fast.solvers.rex import Rex
from doodl_fast.solvers.sampler import Sampler

STEPS = 5
SIZE = {"num_inference_steps": STEPS, "height": 16, "width": 24}
GUIDED: dict[str, Any] = {"true_cfg_scale": 3.0, "negative_prompt": "ugly blurred cat"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_flows.qwen_image()


def embeddings(pipe: Any) -> dict[str, Any]:
    made = {"prompt_embeds": pipe.encode_prompt("a dog", device="cpu")[0]}
    return {**made, "negative_prompt_embeds": pipe.encode_prompt("ugly blurred cat", device="cpu")[0]}


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize("guidance", [GUIDED, {"true_cfg_scale": 1.0}, {"negative_prompt": ""}])
def test_latents_and_pictures(pipe: Any, solver: Any, guidance: dict[str, Any]) -> None:
    assert check_pictures(solver, pipe, "a dog", {**SIZE, **guidance}, pack).noise().shape == (1, 4, 8, 12)


def test_prompts_of_different_lengths_are_masked(pipe: Any) -> None:
    prompts, negatives = ["a dog", "a red dog blurred"], ["ugly", "ugly blurred cat a circle"]
    chain = check_pictures(Sampler, pipe, prompts, {**SIZE, **GUIDED, "negative_prompt": negatives}, pack)
    assert chain.noise().shape[0] == 2


def test_the_norm_of_the_guided_prediction_is_kept(pipe: Any) -> None:
    chain = DDIM.from_pipeline(pipe, "a dog", **SIZE, **GUIDED)
    alone = DDIM.from_pipeline(pipe, "a dog", true_cfg_scale=1.0, **SIZE)
    x = chain.noise(seed=4)
    with torch.no_grad():
        guided, cond = (pack(one.denoiser(x, 500)) for one in (chain, alone))
    assert relative(guided.norm(dim=-1), cond.norm(dim=-1)) < 1e-5 and relative(guided, cond) > 1e-2


def test_noise_size_and_shift_are_the_pipelines(pipe: Any) -> None:
    chain = Sampler.from_pipeline(pipe, ["a dog", "a cat"], true_cfg_scale=1.0, num_inference_steps=STEPS)
    drawn = pipe.prepare_latents(2, 4, 16, 16, torch.float32, "cpu", torch.Generator().manual_seed(5))
    assert torch.equal(pack(chain.noise(seed=5)), drawn)
    sigmas = [1.0, 0.8, 0.5, 0.3, 0.1]
    given = {"true_cfg_scale": 1.0, "sigmas": sigmas, **SIZE}
    check_pictures(DDIM, pipe, "a dog", given, pack)
    own = DDIM.from_pipeline(pipe, "a dog", true_cfg_scale=1.0, **SIZE)
    assert own.schedule != DDIM.from_pipeline(pipe, "a dog", **given).schedule
    large = DDIM.from_pipeline(pipe, "a dog", true_cfg_scale=1.0, **{**SIZE, "height": 64})
    assert large.schedule != own.schedule, "mu depends on the size"


@pytest.mark.parametrize(
    ("solver", "memory", "scale"),
    [(DDIM, "checkpoint", 3.0), (Sampler, "auto", 3.0), (EDICT, "reversible", 3.0), (BDIA, "reversible", 1.0)],
)
@pytest.mark.filterwarnings("ignore:negative_prompt_embeds. it is not used")
def test_gradient_is_that_of_plain_autograd(pipe: Any, solver: Any, memory: str, scale: float) -> None:
    given = embeddings(pipe)
    if scale == 1:
        given.pop("negative_prompt_embeds")
    check_gradient(solver, pipe, memory, given, {"num_inference_steps": STEPS, "true_cfg_scale": scale})


@pytest.mark.parametrize("solver", [EDICT, BDIA, OBELM, Rex])
def test_exact_arithmetic_is_undone_to_the_bit(pipe: Any, solver: Any) -> None:
    check_no_bit_differs(solver, pipe, "a dog", {"num_inference_steps": STEPS, **GUIDED})


def test_pictures_are_encoded_and_decoded(pipe: Any) -> None:
    chain = DDIM.from_pipeline(pipe, "a dog", true_cfg_scale=1.0, num_inference_steps=2)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = chain.decode.encode(images)
    mean, deviation = (
        torch.tensor(pipe.vae.config[f"latents_{name}"]).reshape(1, -1, 1, 1) for name in ("mean", "std")
    )
    with torch.no_grad():
        raw = pipe.vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
        expected = pipe.vae.decode(raw[:, :, None]).sample[:, :, 0]
        assert relative(latents, (raw - mean) / deviation) < 1e-5
        assert relative(chain.decode(latents), expected) < 1e-5
        lean = chain.decode.leaner()
        assert relative(lean(latents), expected) < 1e-5 and lean.leaner() is None


def test_what_has_no_effect_is_said(pipe: Any) -> None:
    for options, message in (
        ({}, r"^true_cfg_scale: 4 is not used without a negative prompt, as in QwenImagePipeline; pass one"),
        ({"true_cfg_scale": 1.0, "negative_prompt": "ugly"}, r"^negative_prompt: it is not used with true_cfg_scale=1"),
        ({"guidance_scale": 2.0, "true_cfg_scale": 1.0}, r"^guidance_scale: it is not used, because this network"),
    ):
        with pytest.warns(RuntimeWarning, match=message) as found:
            DDIM.from_pipeline(pipe, "a dog", num_inference_steps=2, **options)
        assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDIM.from_pipeline(pipe, "a dog", "", num_inference_steps=2)


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    def make(*args: Any, **options: Any) -> Any:
        return DDIM.from_pipeline(pipe, *args, num_inference_steps=2, **options)

    with pytest.raises(ValueError, match=r"width: expected a positive multiple of 4 .* patch of 2\), got 18"):
        make("a dog", "", width=18)
    with pytest.raises(ValueError, match=r"height: expected 16, the size that this chain's schedule is for \(use_dyna"):
        make("a dog", "").noise(height=32)
    with pytest.raises(TypeError, match=r"^prompt_2: from_pipeline has no such argument for QwenImagePipeline"):
        make("a dog", "", prompt_2="a cat")
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        make("a dog", ["ugly", "blurred"])
    with pytest.raises(ValueError, match=r"^max_sequence_length: expected at most 1024, got 2000"):
        make("a dog", "", max_sequence_length=2000)
    with pytest.raises(ValueError, match=r"^prompt_embeds: expected at most 2 tokens, got 3; pass a larger max_seq"):
        make(prompt_embeds=embeddings(pipe)["prompt_embeds"], max_sequence_length=2, true_cfg_scale=1.0)
    deaf = diffusers.QwenImagePipeline(**{**pipe.components, "text_encoder": None})
    with pytest.raises(ValueError, match=r"^prompt: QwenImagePipeline has no text_encoder, .* pass prompt_embeds ins"):
        DDIM.from_pipeline(deaf, "a dog", "")
    edit = diffusers.QwenImageInpaintPipeline(**pipe.components)
    with pytest.raises(TypeError, match=r"^pipe: from_pipeline does not know QwenImageInpaintPipeline; expected one"):
        DDIM.from_pipeline(edit, "a dog", "")
    other = tiny_flows.qwen_image()
    other.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with pytest.raises(TypeError, match=r"^scheduler: expected one of flow matching .* got DDIMScheduler"):
        DDIM.from_pipeline(other, "a dog", "")
    other = tiny_flows.qwen_image()
    other.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match=r"^pipe: expected a transformer with guidance_embeds=False, got True"):
        DDIM.from_pipeline(other, "a dog", "")
