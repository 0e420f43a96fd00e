"""Chains of CogVideoX pipelines have the pipeline's own latents and videos, and the gradient of naive autograd."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_videos
import torch
from conftest import relative
from torch import Tensor
from video_oracle import compare_frames, compare_gradients, compare_leaner, compare_with_pipeline

from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

SIZE: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 9}
OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "max_sequence_length": 8, **SIZE}
KINDS: dict[str, dict[str, Any]] = {
    "1.0 with 2 B parameters": {"use_rotary_positional_embeddings": False},
    "1.0 with 5 B parameters": {},
    "1.5": {"patch_size_t": 2, "patch_bias": False},
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_videos.cogvideox()


def embeddings(pipe: Any) -> dict[str, Tensor]:
    made = pipe.encode_prompt("a dog", "ugly", device="cpu", max_sequence_length=8)
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), made, strict=True))


@pytest.mark.parametrize("guidance", [{"use_dynamic_cfg": True}, {"guidance_scale": 3.0, "negative_prompt": "ugly"}])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_videos_by_ddim(kind: str, guidance: dict[str, Any]) -> None:
    compare_with_pipeline(tiny_videos.cogvideox(**KINDS[kind]), DDIM, {**OPTIONS, **guidance})


def test_latents_and_videos_without_guidance_and_by_the_pipelines_own_scheduler(pipe: Any) -> None:
    compare_with_pipeline(pipe, DDIM, {**OPTIONS, "guidance_scale": 1.0})
    compare_with_pipeline(pipe, Sampler, OPTIONS)


def test_a_batch_of_prompts_and_the_pipelines_own_noise_and_size(pipe: Any) -> None:
    prompts, negatives = ["a dog", "a cat"], ["ugly", "blurred"]
    options: dict[str, Any] = {"num_inference_steps": 2, "max_sequence_length": 8}
    chain = DDIM.from_pipeline(pipe, prompts, negatives, memory="checkpoint", **options)
    x = chain.noise(seed=5)
    assert x.shape == (2, 3, 4, 8, 8)
    options |= {"generator": torch.Generator().manual_seed(5), "output_type": "latent"}
    expected = pipe(prompts, negatives, **options).frames
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5, "the default guidance scale is the pipeline's"


@pytest.mark.parametrize(
    ("solver", "memory", "dynamic"),
    [(DDIM, "checkpoint", False), (DDIM, "auto", True), (EDICT, "reversible", False), (EDICT, "checkpoint", True)],
)
def test_gradient_is_that_of_plain_autograd(pipe: Any, solver: Any, memory: str, dynamic: bool) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "use_dynamic_cfg": dynamic, **SIZE}
    compare_gradients(pipe, solver, memory, options, lambda: embeddings(pipe))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [[0], [2, 5]])
def test_some_frames_as_pictures(kind: str, frames: list[int]) -> None:
    pipe = tiny_videos.cogvideox(**KINDS[kind])
    chain = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE | {"num_frames": 17}, **embeddings(pipe))
    compare_frames(chain.decode, chain.noise(), frames)


def test_the_vae_decodes_no_further_than_its_groups_of_frames_need(pipe: Any, monkeypatch: Any) -> None:
    chain = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE | {"num_frames": 17}, **embeddings(pipe))
    seen: list[int] = []
    real = diffusers.AutoencoderKLCogVideoX.decode
    monkeypatch.setattr(
        diffusers.AutoencoderKLCogVideoX, "decode", lambda vae, z, **k: seen.append(z.shape[2]) or real(vae, z, **k)
    )
    with torch.no_grad():
        for frames in ([0], [8], [9], [16]):
            chain.decode.pictures(frames)(chain.noise())
    assert seen == [3, 3, 5, 5]


def test_decoders_that_need_less_memory(pipe: Any) -> None:
    wide = tiny_videos.cogvideox()
    wide.vae.double()
    chain = DDIM.from_pipeline(wide, num_inference_steps=2, **SIZE | {"num_frames": 17}, **embeddings(pipe))
    assert compare_leaner(chain.decode, chain.noise(batch=2).double()) == 3
    whole, by_blocks, peaks = chain.decode, chain.decode.leaner(), []
    for version in (whole, by_blocks, by_blocks.leaner()):
        leaf = chain.noise().double().requires_grad_()
        with Tracker("cpu") as seen:
            torch.autograd.grad(version(leaf).square().sum(), leaf)
        peaks.append(seen.peak)
    assert peaks[2] < peaks[1] < 0.7 * peaks[0]


def test_videos_are_encoded_as_by_the_vae(pipe: Any) -> None:
    decode = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE, **embeddings(pipe)).decode
    videos = torch.rand(1, 9, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(videos.transpose(1, 2)).latent_dist.mode()
    assert relative(decode.encode(videos), raw.transpose(1, 2) * 0.7) < 1e-5


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"^height: expected a positive multiple of 16 .* patch of 2\), got 24"):
        DDIM.from_pipeline(pipe, "a dog", height=24)
    with pytest.raises(ValueError, match=r"^num_frames: expected a multiple of 8, plus 1, .* got 13; the nearest is"):
        DDIM.from_pipeline(pipe, "a dog", num_frames=13)
    with pytest.raises(TypeError, match=r"^image: from_pipeline has no such argument for CogVideoXPipeline"):
        DDIM.from_pipeline(pipe, "a dog", image=3)
    with pytest.raises(ValueError, match=r"^use_dynamic_cfg: expected False, because guidance_scale is 1, got True"):
        DDIM.from_pipeline(pipe, "a dog", guidance_scale=1.0, use_dynamic_cfg=True)
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        DDIM.from_pipeline(pipe, "a dog", ["ugly", "blurred"])
    with pytest.raises(ValueError, match=r"^prompt_embeds: expected 8 tokens, for which the network has positions, go"):
        DDIM.from_pipeline(tiny_videos.cogvideox(use_rotary_positional_embeddings=False), "a dog")
    newer = tiny_videos.cogvideox(**KINDS["1.5"])
    chain = DDIM.from_pipeline(newer, "a dog", num_inference_steps=2, **SIZE)
    assert chain.noise().shape == (1, 4, 4, 2, 4)
    with pytest.raises(ValueError, match=r"^num_frames: expected 9, for which the latents of this chain have 1 more"):
        chain.noise(num_frames=17)
    with pytest.raises(ValueError, match=r"^videos: the latents of this chain begin with 1 that no video has"):
        chain.decode.encode(torch.zeros(1, 9, 3, 16, 32))
    with pytest.raises(ValueError, match=r"^latents: expected shape \(B, frames, 4, height, width\), got \(1, 2, 3, 4"):
        chain.decode(torch.zeros(1, 2, 3, 4, 4))


def test_pipelines_that_do_not_fit_are_refused(pipe: Any) -> None:
    wide = tiny_videos.cogvideox(in_channels=8)
    with pytest.raises(ValueError, match=r"^pipe: expected a transformer of 4 input channels .* got 8: models that st"):
        DDIM.from_pipeline(wide, "a dog")
    other = diffusers.CogVideoXImageToVideoPipeline(**pipe.components)
    with pytest.raises(TypeError, match=r"^pipe: from_pipeline does not know CogVideoXImageToVideoPipeline; expected"):
        DDIM.from_pipeline(other, "a dog")
    flow = tiny_videos.cogvideox(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(TypeError, match=r"^scheduler: FlowMatchEulerDiscreteScheduler has no alphas_cumprod; flow-mat"):
        DDIM.from_pipeline(flow, "a dog")
    noisy = tiny_videos.cogvideox(diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config))
    with pytest.raises(ValueError, match=r"^scheduler: the steps of CogVideoXDPMScheduler cannot be read off"):
        Sampler.from_pipeline(noisy, "a dog", **OPTIONS)
    with pytest.warns(RuntimeWarning, match=r"^CogVideoXDPMScheduler: not part of the chain: the noise that it adds"):
        DDIM.from_pipeline(noisy, "a dog", **OPTIONS)
