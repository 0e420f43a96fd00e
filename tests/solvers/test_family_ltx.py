"""Chains of LTX-Video pipelines have the pipeline's own latents and videos, and the gradient of naive autograd."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_videos
import torch
from conftest import relative
from torch import Tensor
from video_oracle import compare_frames, compare_gradients, compare_leaner, compare_with_pipeline

from doodl_fast.diffusion.families.ltx import pack, unpack
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

SIZE: dict[str, Any] = {"height": 32, "width": 64, "num_frames": 5}
OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "max_sequence_length": 8, **SIZE}
DECODING: dict[str, Any] = {"decode_timestep": 0.05, "decode_noise_scale": 0.2}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_videos.ltx()


@pytest.fixture(scope="module")
def timed() -> Any:
    return tiny_videos.ltx(timestep_conditioning=True)


def embeddings(pipe: Any) -> dict[str, Tensor]:
    made = pipe.encode_prompt("a dog", "ugly", device="cpu", max_sequence_length=8)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    return dict(zip(names, made, strict=True))


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize("guidance", [{"negative_prompt": "ugly", "frame_rate": 8}, {"guidance_scale": 1.0}])
def test_latents_and_videos(pipe: Any, solver: Any, guidance: dict[str, Any]) -> None:
    compare_with_pipeline(pipe, solver, {**OPTIONS, **guidance}, pack)


def test_a_scheduler_that_does_not_shift_by_the_size() -> None:
    pipe = tiny_videos.ltx(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    compare_with_pipeline(pipe, DDIM, OPTIONS, pack)
    chain = DDIM.from_pipeline(pipe, "a dog", num_inference_steps=2, **SIZE)
    assert chain.noise(num_frames=9).shape == (1, 4, 3, 4, 8)


@pytest.mark.parametrize("decoding", [{}, {"decode_timestep": 0.05}, DECODING])
def test_a_vae_that_takes_a_timestep_and_noise(timed: Any, decoding: dict[str, Any]) -> None:
    compare_with_pipeline(timed, DDIM, {**OPTIONS, **decoding}, pack)


def test_a_batch_of_prompts_and_the_pipelines_own_noise(pipe: Any) -> None:
    prompts, negatives = ["a dog", "a cat"], ["ugly", "blurred"]
    chain = DDIM.from_pipeline(pipe, prompts, negatives, memory="checkpoint", **OPTIONS)
    x = chain.noise(seed=5)
    options = {"generator": torch.Generator().manual_seed(5), "output_type": "latent"}
    expected = pipe(prompts, negatives, **options, **OPTIONS).frames
    with torch.no_grad():
        assert relative(pack(chain(x)[0]), expected) < 1e-5, "the default guidance scale is the pipeline's"
    assert torch.equal(unpack(pack(x), 2, 4, 8), x)
    assert torch.equal(pack(x), pipe._pack_latents(x))


def test_the_default_size_is_the_pipelines() -> None:
    pipe = tiny_videos.ltx(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert DDIM.from_pipeline(pipe, "a dog", num_inference_steps=2).noise().shape == (1, 4, 41, 64, 88)


@pytest.mark.parametrize(
    ("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (EDICT, "reversible"), (EDICT, "checkpoint")]
)
def test_gradient_is_that_of_plain_autograd(timed: Any, solver: Any, memory: str) -> None:
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, **SIZE, **DECODING}
    compare_gradients(timed, solver, memory, options, lambda: embeddings(timed))


@pytest.mark.parametrize("frames", [[0], [2, 4]])
def test_some_frames_as_pictures(timed: Any, frames: list[int]) -> None:
    chain = DDIM.from_pipeline(timed, num_inference_steps=2, **SIZE, **embeddings(timed), **DECODING)
    compare_frames(chain.decode, chain.noise(), frames)


def test_decoders_that_need_less_memory(timed: Any) -> None:
    chain = DDIM.from_pipeline(timed, num_inference_steps=2, **SIZE, **embeddings(timed), **DECODING)
    assert compare_leaner(chain.decode, chain.noise(batch=2)) == 2


def test_videos_are_encoded_as_by_the_vae(pipe: Any) -> None:
    decode = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE, **embeddings(pipe)).decode
    videos = torch.rand(1, 5, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(videos.transpose(1, 2)).latent_dist.mode()
        expected = pipe._normalize_latents(raw, pipe.vae.latents_mean, pipe.vae.latents_std, 0.9)
    assert relative(decode.encode(videos), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_what_does_not_fit_is_refused(pipe: Any, timed: Any) -> None:
    with pytest.raises(ValueError, match=r"^scheduler: FlowMatchEulerDiscreteScheduler gives noise levels that are no"):
        DDIM.from_pipeline(pipe, "a dog")
    with pytest.raises(ValueError, match=r"^height: expected a positive multiple of 8 \(the VAE's scale factor\), got"):
        DDIM.from_pipeline(pipe, "a dog", height=20)
    with pytest.raises(ValueError, match=r"^num_frames: expected a multiple of 4, plus 1, .* got 8; the nearest is 9"):
        DDIM.from_pipeline(pipe, "a dog", num_frames=8)
    with pytest.raises(TypeError, match=r"^guidance_rescale: from_pipeline has no such argument for LTXPipeline"):
        DDIM.from_pipeline(pipe, "a dog", guidance_rescale=0.7, **SIZE)
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        DDIM.from_pipeline(pipe, "a dog", ["ugly", "blurred"], **SIZE)
    with pytest.raises(ValueError, match=r"^prompt_attention_mask: expected a tensor because prompt_embeds is given"):
        DDIM.from_pipeline(pipe, prompt_embeds=embeddings(pipe)["prompt_embeds"], **SIZE)
    with pytest.raises(ValueError, match=r"^frame_rate: expected a number above 0, got 0"):
        DDIM.from_pipeline(pipe, "a dog", frame_rate=0, **SIZE)
    for name in DECODING:
        with pytest.raises(ValueError, match=rf"^{name}: expected None because the VAE has timestep_conditioning=Fals"):
            DDIM.from_pipeline(pipe, "a dog", **{name: 0.1}, **SIZE)
        with pytest.raises(TypeError, match=rf"^{name}: expected a number, got \[0.1\]"):
            DDIM.from_pipeline(timed, "a dog", **{name: [0.1]}, **SIZE)
    chain = DDIM.from_pipeline(pipe, "a dog", **OPTIONS)
    for name, value in (("height", 40), ("num_frames", 9)):
        with pytest.raises(ValueError, match=rf"^{name}: expected {SIZE[name]}, .* this chain's schedule is for \(use"):
            chain.noise(**{name: value})


def test_pipelines_that_do_not_fit_are_refused(pipe: Any) -> None:
    config = {**pipe.transformer.config, "in_channels": 8}
    wide = diffusers.LTXVideoTransformer3DModel.from_config(config)
    with pytest.raises(ValueError, match=r"^pipe: expected a transformer with patch_size=1, patch_size_t=1 and 4 inpu"):
        DDIM.from_pipeline(diffusers.LTXPipeline(**{**pipe.components, "transformer": wide}), "a dog")
    other = diffusers.LTXImageToVideoPipeline(**pipe.components)
    with pytest.raises(TypeError, match=r"^pipe: from_pipeline does not know LTXImageToVideoPipeline; expected one of"):
        DDIM.from_pipeline(other, "a dog")
    still = tiny_videos.ltx(diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(TypeError, match=r"^scheduler: expected one of flow matching .* got DDIMScheduler; use FlowMat"):
        DDIM.from_pipeline(still, "a dog")
    noisy = tiny_videos.ltx(decoder_inject_noise=(True, False, False, False, False))
    with pytest.warns(RuntimeWarning, match=r"^pipe: its VAE has decoder_inject_noise, so it draws noise") as caught:
        DDIM.from_pipeline(noisy, "a dog", **OPTIONS)
    assert [w.filename for w in caught] == [__file__]
