"""Chains of AnimateDiff pipelines have the pipeline's own latents and videos, and the gradient of naive autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_videos
import torch
from conftest import relative
from torch import Tensor
from video_oracle import compare_frames, compare_gradients, compare_leaner, compare_with_pipeline

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

SIZE: dict[str, Any] = {"height": 16, "width": 24, "num_frames": 4}
OPTIONS: dict[str, Any] = {"num_inference_steps": 4, **SIZE}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_videos.animatediff(tmp_path_factory.mktemp("animatediff"))


def embeddings(pipe: Any) -> dict[str, Tensor]:
    made = pipe.encode_prompt("a dog", "cpu", 1, True, "ugly")
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), made, strict=True))


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 3.0, "negative_prompt": "ugly"}, {"guidance_scale": 1.0}])
def test_latents_and_videos_by_ddim(pipe: Any, guidance: dict[str, Any]) -> None:
    compare_with_pipeline(pipe, DDIM, {**OPTIONS, **guidance})


def test_latents_and_videos_by_the_pipelines_own_scheduler(tmp_path: Path) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear")
    compare_with_pipeline(tiny_videos.animatediff(tmp_path, scheduler), Sampler, OPTIONS)


def test_a_batch_of_prompts_and_the_pipelines_own_noise_and_size(pipe: Any) -> None:
    prompts, negatives = ["a dog", "a cat"], ["ugly", "blurred"]
    chain = DDIM.from_pipeline(pipe, prompts, negatives, 2, num_frames=3, memory="checkpoint")
    x = chain.noise(seed=5)
    options = {"generator": torch.Generator().manual_seed(5), "output_type": "latent"}
    expected = pipe(prompts, 3, negative_prompt=negatives, num_inference_steps=2, **options).frames
    assert x.shape == (2, 4, 3, 8, 8)
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5, "the default guidance scale is the pipeline's"


@pytest.mark.parametrize(
    ("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (EDICT, "reversible"), (EDICT, "checkpoint")]
)
def test_gradient_is_that_of_plain_autograd(pipe: Any, solver: Any, memory: str) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, **SIZE}
    compare_gradients(pipe, solver, memory, options, lambda: embeddings(pipe))


@pytest.mark.parametrize("frames", [None, [3, 1]])
def test_some_frames_as_pictures(pipe: Any, frames: list[int] | None) -> None:
    chain = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE, **embeddings(pipe))
    compare_frames(chain.decode, chain.noise(), frames)


def test_the_vae_decodes_the_chosen_frames_alone(pipe: Any, monkeypatch: Any) -> None:
    chain = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE, **embeddings(pipe))
    seen: list[int] = []
    real = diffusers.AutoencoderKL.decode
    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", lambda vae, z, **k: seen.append(len(z)) or real(vae, z, **k))
    with torch.no_grad():
        chain.decode.pictures([3, 1])(chain.noise(batch=2))
    assert seen == [4]


def test_decoders_that_need_less_memory(pipe: Any) -> None:
    chain = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE, **embeddings(pipe))
    assert compare_leaner(chain.decode, chain.noise()) == 3


def test_videos_are_encoded_frame_by_frame(pipe: Any) -> None:
    decode = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE, **embeddings(pipe)).decode
    videos = torch.rand(2, 4, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        frames = [pipe.vae.encode(videos[:, number]).latent_dist.mode() for number in range(4)]
    assert relative(decode.encode(videos), torch.stack(frames, 2) * pipe.vae.config.scaling_factor) < 1e-5


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"^width: expected a positive multiple of 2 \(the VAE's scale factor\), got"):
        DDIM.from_pipeline(pipe, "a dog", width=17)
    with pytest.raises(ValueError, match=r"^num_frames: expected at most 8, for which the network has positions, got"):
        DDIM.from_pipeline(pipe, "a dog", num_frames=9)
    with pytest.raises(ValueError, match=r"^num_frames: expected a multiple of 1, .* got 0; the nearest is 1"):
        DDIM.from_pipeline(pipe, "a dog", num_frames=0)
    with pytest.raises(TypeError, match=r"^ip_adapter_image: from_pipeline has no such argument for AnimateDiffPipeli"):
        DDIM.from_pipeline(pipe, "a dog", ip_adapter_image=3, **SIZE)
    with pytest.raises(TypeError, match=r"^prompt: expected a string or a list of strings, got \{0: 'a dog'\}"):
        DDIM.from_pipeline(pipe, {0: "a dog"}, **SIZE)  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match=r"^negative_prompt: it is not used with guidance_scale=1;") as caught:
        DDIM.from_pipeline(pipe, "a dog", "ugly", guidance_scale=1.0, **OPTIONS)
    assert [w.filename for w in caught] == [__file__]


def test_pipelines_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pipe = tiny_videos.animatediff(tmp_path)
    pipe.enable_free_init()
    for kind, name in (("free_init", "FreeInit"), ("free_noise", "FreeNoise")):
        with pytest.raises(ValueError, match=rf"^pipe: AnimateDiffPipeline has {name}, which .* pipe.disable_{kind}"):
            DDIM.from_pipeline(pipe, "a dog")
        pipe.disable_free_init()
        pipe._free_noise_context_length = 16  # what enable_free_noise sets
    wide = tiny_videos.animatediff(tmp_path, in_channels=9)
    with pytest.raises(ValueError, match=r"^pipe: expected a UNet of 4 input channels \(the latents'\), got 9: models"):
        DDIM.from_pipeline(wide, "a dog")
    assert pipe.free_noise_enabled
    adapted = tiny_videos.animatediff(tmp_path)
    adapted.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ValueError, match=r"^pipe: AnimateDiffPipeline has an IP-Adapter, which from_pipeline would ig"):
        DDIM.from_pipeline(adapted, "a dog")
    clipping = tiny_videos.animatediff(tmp_path, diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match=r"^scheduler: DDIMScheduler has clip_sample=True"):
        DDIM.from_pipeline(clipping, "a dog")
    flow = tiny_videos.animatediff(tmp_path, diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(TypeError, match=r"^scheduler: FlowMatchEulerDiscreteScheduler has no alphas_cumprod; flow-mat"):
        DDIM.from_pipeline(flow, "a dog")
