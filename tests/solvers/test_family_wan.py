"""Chains of Wan pipelines have the pipeline's own latents and videos, and the gradient of naive autograd."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_videos
import torch
from conftest import relative
from video_oracle import compare_leaner

import doodl_fast
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.guidance.symmetry import Symmetry
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

STEPS = 4
SIZE: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 5}
OPTIONS: dict[str, Any] = {"num_inference_steps": STEPS, "max_sequence_length": 8, **SIZE}
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_videos.wan()


@pytest.fixture(scope="module")
def two_experts() -> Any:
    return tiny_videos.wan(transformer_2=tiny_videos.wan_transformer(seed=7), boundary_ratio=0.875)


def embeddings(pipe: Any) -> dict[str, torch.Tensor]:
    made = pipe.encode_prompt("a dog", "ugly", device="cpu", max_sequence_length=8)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: value.detach().clone().requires_grad_() for name, value in zip(names, made, strict=True)}


def compare(pipe: Any, solver: Any = DDIM, **guidance: Any) -> None:
    """Compares latents and videos with the pipeline's, and checks that network and prompt matter."""
    chain = solver.from_pipeline(pipe, "a dog", memory="checkpoint", **OPTIONS, **guidance)
    x = chain.noise(seed=3)
    assert x.shape == (1, 4, 3, 8, 16)
    expected = pipe("a dog", latents=x, output_type="latent", **OPTIONS, **guidance).frames
    with torch.no_grad():
        (x0,) = chain(x)
        videos = (chain.decode(x0) / 2 + 0.5).clamp(0, 1)
        other = solver.from_pipeline(pipe, "a cat", memory="checkpoint", **OPTIONS, **guidance)(x)[0]
    assert relative(x, expected) > 0.1, "the weights must matter"
    assert relative(other, expected) > 1e-3, "the prompt must matter"
    assert relative(x0, expected) < 1e-5
    assert videos.shape == (1, 5, 3, 16, 32)
    assert relative(videos, pipe("a dog", latents=x, output_type="pt", **OPTIONS, **guidance).frames) < 1e-5


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_latents_and_videos_by_ddim(pipe: Any, guidance_scale: float) -> None:
    compare(pipe, guidance_scale=guidance_scale)


def test_latents_and_videos_by_the_pipelines_own_scheduler(pipe: Any) -> None:
    compare(tiny_videos.wan(diffusers.UniPCMultistepScheduler(**UNIPC)), Sampler, negative_prompt="ugly")


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 3.0, "guidance_scale_2": 6.0}])
def test_two_transformers(two_experts: Any, guidance: dict[str, Any]) -> None:
    timesteps = DDIM.from_pipeline(two_experts, "a dog", **OPTIONS).schedule.timesteps
    assert timesteps[0] > 875 > timesteps[-1], "both must be called"
    compare(two_experts, **guidance)


def test_a_timestep_for_each_token() -> None:
    compare(tiny_videos.wan(expand_timesteps=True), guidance_scale=3.0)


def test_a_batch_of_prompts_and_the_pipelines_own_noise(pipe: Any) -> None:
    prompts, negatives = ["a dog", "a cat"], ["ugly", "blurred"]
    chain = DDIM.from_pipeline(pipe, prompts, negatives, memory="checkpoint", **OPTIONS)
    x = chain.noise(seed=5)
    options = {"generator": torch.Generator().manual_seed(5), "output_type": "latent"}
    expected = pipe(prompts, negatives, **options, **OPTIONS).frames
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5, "the default guidance scale is the pipeline's"


def test_the_default_size_and_length_are_the_pipelines(pipe: Any) -> None:
    chain = DDIM.from_pipeline(pipe, num_inference_steps=2, **embeddings(pipe))
    assert chain.noise().shape == (1, 4, 41, 240, 416)
    assert DDIM.from_pipeline(pipe, "a dog", num_inference_steps=2).denoiser.cond.shape[1] == 512


@pytest.mark.parametrize(
    ("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (EDICT, "reversible"), (EDICT, "checkpoint")]
)
def test_gradient_is_that_of_plain_autograd(two_experts: Any, solver: Any, memory: str) -> None:
    gradients = []
    scales = {"guidance_scale": 2.0, "guidance_scale_2": 1.5}
    for mode in ("naive", memory):
        given = embeddings(two_experts)
        chain = solver.from_pipeline(two_experts, memory=mode, num_inference_steps=3, **SIZE, **scales, **given)
        x = chain.noise(seed=1).requires_grad_()
        loss = chain.decode(chain(x)[0]).square().mean()
        gradients.append(torch.autograd.grad(loss, [x, *given.values()]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-5


def test_exact_inversion(pipe: Any) -> None:
    chain = EDICT.from_pipeline(pipe, "a dog", guidance_scale=3.0, arithmetic="exact", memory="reversible", **OPTIONS)
    with torch.no_grad():
        state = chain.forward_state(chain.state(chain.noise(seed=2)))
        assert chain.forward_state(chain.inverse_state(state)).equals(state)


@pytest.mark.parametrize("frames", [None, [0], [2, 1], [-1, 0, 4]])
def test_some_frames_as_pictures(pipe: Any, frames: list[int] | None) -> None:
    decode = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE, **embeddings(pipe)).decode
    leaves = [torch.randn(2, 4, 3, 8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in "ab"]
    whole, some = decode(leaves[0]), decode.pictures(frames)(leaves[1])
    expected = (whole if frames is None else whole[:, frames]).flatten(0, 1)
    assert torch.allclose(some, expected, atol=1e-6) and expected.std() > 0.05
    pairs = zip((expected, some), leaves, strict=True)
    gradients = [torch.autograd.grad(made.square().sum(), leaf)[0] for made, leaf in pairs]
    assert relative(gradients[1], gradients[0]) < 1e-5


def test_a_causal_vae_decodes_no_further_than_the_last_chosen_frame(pipe: Any, monkeypatch: Any) -> None:
    decode = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE, **embeddings(pipe)).decode
    seen: list[int] = []
    real = diffusers.AutoencoderKLWan.decode
    monkeypatch.setattr(
        diffusers.AutoencoderKLWan, "decode", lambda vae, z, **k: seen.append(z.shape[2]) or real(vae, z, **k)
    )
    with torch.no_grad():
        for frames in (None, [0], [1, 2], [3]):
            decode.pictures(frames)(torch.zeros(1, 4, 3, 8, 16))
    assert seen == [3, 1, 2, 3]


def test_decoders_that_need_less_memory(pipe: Any) -> None:
    wide = tiny_videos.wan(vae=tiny_videos.wan_vae().double())
    decode = DDIM.from_pipeline(wide, num_inference_steps=2, **SIZE, **embeddings(pipe)).decode
    latents = torch.randn(2, 4, 5, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert compare_leaner(decode, latents) == 2
    peaks = []
    for version in (decode, decode.leaner()):
        leaf = latents[:1].clone().requires_grad_()
        with Tracker("cpu") as seen:
            torch.autograd.grad(version(leaf).square().sum(), leaf)
        peaks.append(seen.peak)
    assert peaks[1] < 0.7 * peaks[0]


def test_videos_are_encoded_as_by_the_vae(pipe: Any) -> None:
    decode = DDIM.from_pipeline(pipe, num_inference_steps=2, **SIZE, **embeddings(pipe)).decode
    videos = torch.rand(1, 5, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(videos.transpose(1, 2)).latent_dist.mode()
    means, deviations = (torch.tensor(pipe.vae.config[name]) for name in ("latents_mean", "latents_std"))
    expected = (raw - means.reshape(1, -1, 1, 1, 1)) / deviations.reshape(1, -1, 1, 1, 1)
    assert relative(decode.encode(videos), expected) < 1e-5
    with pytest.raises(ValueError, match=r"^videos: expected a number of frames that is a multiple of 2, plus 1, got"):
        decode.encode(videos[:, :4])
    with pytest.raises(ValueError, match=r"^videos: expected height and width in multiples of 2, got shape"):
        decode.encode(videos[..., :31])


def test_optimize_gets_videos_and_returns_videos(pipe: Any, tmp_path: Any) -> None:
    chain = DDIM.from_pipeline(pipe, num_inference_steps=2, guidance_scale=1.0, **SIZE, prompt="a dog")
    options: dict[str, Any] = {"num_optimization_steps": 1, "progress": False}
    loss = Symmetry()
    with pytest.raises(ValueError, match=r"^images: expected shape .* of videos .* videos.flatten\(0, 1\) are the"):
        doodl_fast.optimize(chain, chain.noise(), chain.decode, loss, **options)
    result = doodl_fast.optimize(chain, chain.noise(), chain.decode, lambda v: loss(v.flatten(0, 1)), **options)
    assert isinstance(result.images[0], doodl_fast.VideoTensor) and result.images[0].shape == (1, 5, 3, 16, 32)
    result.images[0].save(tmp_path / "dog.gif")
    same = doodl_fast.optimize(chain, chain.noise(), chain.decode.pictures(), loss, **options)
    assert same.images[0].shape == (5, 3, 16, 32) and same.losses == result.losses


def test_weights_that_diffusers_keeps_in_float32_do_not_decide_the_dtype() -> None:
    pipe = tiny_videos.wan()
    network = pipe.transformer.to(torch.bfloat16)
    for name, weight in network.named_parameters():
        if any(part in name for part in network._keep_in_fp32_modules):
            weight.data = weight.data.float()
    chain = DDIM.from_pipeline(pipe, "a dog", memory="checkpoint", **OPTIONS)
    x = chain.noise(seed=3)
    expected = pipe("a dog", latents=x, output_type="latent", **OPTIONS).frames
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 2e-2


def test_what_does_not_fit_is_refused(pipe: Any, two_experts: Any) -> None:
    with pytest.raises(ValueError, match=r"^width: expected a positive multiple of 4 .* patch of 2\), got 18"):
        DDIM.from_pipeline(pipe, "a dog", width=18)
    with pytest.raises(ValueError, match=r"^num_frames: expected a multiple of 2, plus 1, .* got 6; the nearest is 5"):
        DDIM.from_pipeline(pipe, "a dog", num_frames=6)
    with pytest.raises(TypeError, match=r"^image: from_pipeline has no such argument for WanPipeline"):
        DDIM.from_pipeline(pipe, "a dog", image=3)
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        DDIM.from_pipeline(pipe, "a dog", ["ugly", "blurred"])
    with pytest.raises(ValueError, match=r"^guidance_scale_2: expected None because there is no transformer_2, got 3"):
        DDIM.from_pipeline(pipe, "a dog", guidance_scale_2=3.0)
    with pytest.raises(ValueError, match=r"^guidance_scale_2: expected None because guidance_scale is 1, got 3"):
        DDIM.from_pipeline(two_experts, "a dog", guidance_scale=1.0, guidance_scale_2=3.0)
    with pytest.warns(RuntimeWarning, match=r"^negative_prompt: it is not used with guidance_scale=1;") as caught:
        chain = DDIM.from_pipeline(pipe, "a dog", "ugly", guidance_scale=1.0, **OPTIONS)
    assert [w.filename for w in caught] == [__file__]
    with pytest.raises(
        ValueError, match=r"^latents: expected shape \(B, 4, frames, height, width\), got \(1, 4, 2, 2\)"
    ):
        chain.decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"^frames: expected numbers of the video's 5 frames, from 0, got 5"):
        chain.decode.pictures([5])(torch.zeros(1, 4, 3, 8, 16))
    with pytest.raises(ValueError, match=r"^frames: expected at least one, got none"):
        chain.decode.pictures([])
    with pytest.raises(TypeError, match=r"^frames: expected ints, .* got \[0.5\]"):
        chain.decode.pictures([0.5])


def test_pipelines_that_do_not_fit_are_refused(pipe: Any, two_experts: Any) -> None:
    lone = tiny_videos.wan(transformer_2=pipe.transformer)
    with pytest.raises(
        ValueError, match=r"^pipe: expected WanPipeline with both transformer_2 and boundary_ratio, or "
    ):
        DDIM.from_pipeline(lone, "a dog")
    lone = tiny_videos.wan(transformer=None, transformer_2=pipe.transformer, boundary_ratio=0.9)
    with pytest.raises(TypeError, match=r"^pipe: expected WanPipeline with .* got one without transformer$"):
        DDIM.from_pipeline(lone, "a dog")
    wide = tiny_videos.wan(transformer=tiny_videos.wan_transformer(in_channels=9))
    with pytest.raises(
        ValueError, match=r"^pipe: expected a transformer of 4 input channels .* got 9: Wan's models tha"
    ):
        DDIM.from_pipeline(wide, "a dog")
    other = diffusers.WanImageToVideoPipeline(**pipe.components, image_encoder=None, image_processor=None)
    with pytest.raises(
        TypeError, match=r"^pipe: from_pipeline does not know WanImageToVideoPipeline; expected one of "
    ):
        DDIM.from_pipeline(other, "a dog")
    still = tiny_videos.wan(diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(TypeError, match=r"^scheduler: expected one of flow matching .* got DDIMScheduler; use FlowMat"):
        DDIM.from_pipeline(still, "a dog")
