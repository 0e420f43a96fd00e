"""Chains of AudioLDM 2 and Stable Audio have the pipelines' own latents and waveforms, and the gradient of autograd."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_audio
import torch
from conftest import relative
from torch import Tensor
from video_oracle import compare_gradients, compare_leaner

from doodl_fast.solvers.bdia import BDIA
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:CosineDPMSolverMultistepScheduler. not part of the chain"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated"),
]
OPTIONS: dict[str, Any] = {"num_inference_steps": 4}
EMBEDDINGS = ("prompt_embeds", "attention_mask", "generated_prompt_embeds")


@pytest.fixture(scope="module")
def music() -> Any:
    """A pipeline of AudioLDM 2."""
    return tiny_audio.audioldm2()


@pytest.fixture(scope="module")
def stable() -> Any:
    return tiny_audio.stable_audio()


def compare(pipe: Any, oracle: Any, solver: Any, **options: Any) -> None:
    """Compares latents and waveforms with the oracle's, and checks that network and prompt matter."""
    chain = solver.from_pipeline(pipe, "a dog", memory="checkpoint", **OPTIONS, **options)
    x = chain.noise(seed=3)
    expected = oracle("a dog", latents=x, output_type="latent", **OPTIONS, **options).audios
    with torch.no_grad():
        (x0,) = chain(x)
        waveforms = chain.decode(x0)
        other = solver.from_pipeline(pipe, "a cat", memory="checkpoint", **OPTIONS, **options)(x)[0]
    assert relative(x, expected) > 0.1, "the weights must matter"
    assert relative(other, expected) > 1e-3, "the prompt must matter"
    assert relative(x0, expected) < 1e-5
    sound = oracle("a dog", latents=x, output_type="pt", **OPTIONS, **options).audios
    assert waveforms.shape == sound.shape and sound.std() > 0.01
    assert relative(waveforms, sound) < 1e-5


def music_embeddings(pipe: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        made = pipe.encode_prompt("a dog", "cpu", 1, True, negative_prompt="ugly")
    halves = {name: value.chunk(2) for name, value in zip(EMBEDDINGS, made, strict=True)}
    return {f"{prefix}{name}": pair[i] for name, pair in halves.items() for i, prefix in enumerate(("negative_", ""))}


def text_embeddings(pipe: Any) -> dict[str, Tensor]:
    """The T5 embeddings that Stable Audio's pipeline projects."""
    found: dict[str, Tensor] = {}
    for prefix, text in (("", "a dog"), ("negative_", "ugly")):
        inputs = pipe.tokenizer(text, padding="max_length", max_length=8, return_tensors="pt")
        with torch.no_grad():
            found[f"{prefix}prompt_embeds"] = pipe.text_encoder(inputs.input_ids, inputs.attention_mask)[0]
        found[f"{prefix}attention_mask"] = inputs.attention_mask
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"negative_prompt": "ugly", "guidance_scale": 2.0, "audio_length_in_s": 0.02}, {"guidance_scale": 1.0}],
)
def test_audioldm2_by_ddim(music: Any, options: dict[str, Any]) -> None:
    compare(music, music, DDIM, **options)


def test_audioldm2_by_the_pipelines_own_scheduler() -> None:
    pipe = tiny_audio.audioldm2(diffusers.DPMSolverMultistepScheduler())
    compare(pipe, pipe, Sampler)


def test_audioldm2_with_a_batch_of_prompts_and_the_pipelines_own_noise(music: Any) -> None:
    prompts, negatives = ["a dog", "a cat"], ["ugly", "blurred"]
    chain = DDIM.from_pipeline(music, prompts, negatives, memory="checkpoint", audio_length_in_s=0.03, **OPTIONS)
    x = chain.noise(seed=5)
    options = {"generator": torch.Generator().manual_seed(5), "audio_length_in_s": 0.03}
    expected = music(prompts, negative_prompt=negatives, output_type="latent", **options, **OPTIONS).audios
    assert x.shape == (2, 4, 6, 4)
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5, "the default guidance scale is the pipeline's"


def test_audioldm2_as_a_spectrogram(music: Any) -> None:
    decode = DDIM.from_pipeline(music, "a dog", **OPTIONS).decode
    z = torch.randn(2, 4, 8, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = music.vae.decode(z / 0.7).sample
        spectrogram = decode.spectrogram()(z)
        assert relative(spectrogram, expected) < 1e-5
        assert relative(decode(z), music.mel_spectrogram_to_waveform(spectrogram)) < 1e-5
    assert spectrogram.shape == (2, 1, 16, 8) and decode(z).shape == (2, 64) and decode.sampling_rate == 1600
    assert compare_leaner(decode, z) == 3


@pytest.mark.parametrize(
    ("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (EDICT, "reversible"), (EDICT, "checkpoint")]
)
def test_audioldm2_gradient_is_that_of_plain_autograd(music: Any, solver: Any, memory: str) -> None:
    options = {"guidance_scale": 2.0, **OPTIONS}
    compare_gradients(music, solver, memory, options, lambda: music_embeddings(music))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negative_prompt": "ugly", "guidance_scale": 2.0, "audio_start_in_s": 1.0, "audio_end_in_s": 5.0},
        {"guidance_scale": 1.0},
    ],
)
def test_stable_audio_by_ddim(stable: Any, options: dict[str, Any]) -> None:
    compare(stable, tiny_audio.stable_audio(tiny_audio.euler_scheduler()), DDIM, **options)


def test_stable_audio_with_its_own_scheduler_and_given_noise(stable: Any) -> None:
    chain = Sampler.from_pipeline(stable, "a dog", memory="checkpoint", num_inference_steps=5)
    x = chain.noise(seed=3)
    noise = chain.draw_noise(x, seed=4)
    assert len(noise) == 4, "the last step leads to sigma 0 and adds none"

    class Given(tiny_audio.cosine_scheduler()):  # type: ignore[misc]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            left = iter([*noise, torch.zeros_like(x)])
            self.noise_sampler = lambda sigma, sigma_next: next(left)

    oracle = tiny_audio.stable_audio(Given())
    expected = oracle("a dog", latents=x, output_type="latent", num_inference_steps=5).audios
    with torch.no_grad():
        (x0,) = chain(x, noise)
        (still,) = chain(x, [torch.zeros_like(x)] * 4)
    assert relative(x0, expected) < 1e-5 < relative(still, expected)


def test_stable_audio_with_a_batch_of_prompts(stable: Any) -> None:
    prompts, negatives = ["a dog", "a cat"], ["ugly", "blurred"]
    chain = DDIM.from_pipeline(stable, prompts, negatives, memory="checkpoint", **OPTIONS)
    x = chain.noise(seed=5)
    options = {"generator": torch.Generator().manual_seed(5), "output_type": "latent"}
    expected = tiny_audio.stable_audio(tiny_audio.euler_scheduler())(
        prompts, negative_prompt=negatives, **options, **OPTIONS
    ).audios
    assert x.shape == (2, 3, 16) and chain.decode.sampling_rate == 4
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5, "the default guidance scale is the pipeline's"


@pytest.mark.parametrize(
    ("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (BDIA, "reversible"), (EDICT, "checkpoint")]
)
def test_stable_audio_gradient_is_that_of_plain_autograd(stable: Any, solver: Any, memory: str) -> None:
    options = {"guidance_scale": 2.0, **OPTIONS}
    compare_gradients(stable, solver, memory, options, lambda: text_embeddings(stable))
    assert all(weight.requires_grad and weight.grad is None for weight in stable.projection_model.parameters())


def test_stable_audio_is_undone(stable: Any) -> None:
    chain = EDICT.from_pipeline(stable, "a dog", memory="checkpoint", guidance_scale=2.0, **OPTIONS)
    x = chain.noise(seed=2)
    with torch.no_grad():
        starts = chain.inverse(*chain(x))
    assert all(relative(start, x) < 1e-4 for start in starts)


def test_audio_is_encoded_as_by_the_vae(music: Any, stable: Any) -> None:
    for pipe, shape, factor in ((music, (2, 1, 16, 8), 0.7), (stable, (2, 2, 32), 1.0)):
        decode = DDIM.from_pipeline(pipe, "a dog", **OPTIONS).decode
        given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = pipe.vae.encode(given).latent_dist.mode() * factor
        assert relative(decode.encode(given), expected) < 1e-5
        assert decode(decode.encode(given)).shape[0] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_vocoder_in_half_precision(dtype: torch.dtype) -> None:
    """Its gradient keeps its size, however small the loss is."""
    pipe, gradients = tiny_audio.audioldm2(), []
    pipe.vae.to(dtype)
    z = torch.randn(1, 4, 8, 4, generator=torch.Generator().manual_seed(0))
    for kind in (torch.float32, torch.float16):
        pipe.vocoder.to(kind)
        leaf = z.clone().requires_grad_()
        loss = DDIM.from_pipeline(pipe, "a dog", **OPTIONS).decode(leaf).mean() * 1e-6
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert relative(gradients[1], gradients[0]) < 3e-2


def test_what_does_not_fit_is_refused(music: Any, stable: Any) -> None:
    for pipe, name in ((music, "audio_length_in_s"), (stable, "audio_end_in_s")):
        with pytest.raises(ValueError, match=rf"^height: expected None, because .* makes audio, .* use {name}"):
            DDIM.from_pipeline(pipe, "a dog", height=64)
        with pytest.raises(TypeError, match=r"^num_frames: from_pipeline has no such argument for "):
            DDIM.from_pipeline(pipe, "a dog", num_frames=5)
        with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
            DDIM.from_pipeline(pipe, "a dog", ["ugly", "blurred"])
    with pytest.raises(ValueError, match=r"^audio_length_in_s: expected a number of seconds of at least 0.005, got 0"):
        DDIM.from_pipeline(music, "a dog", audio_length_in_s=0)
    with pytest.raises(ValueError, match=r"^generated_prompt_embeds: expected a tensor because prompt_embeds is given"):
        DDIM.from_pipeline(music, prompt_embeds=torch.zeros(1, 8, 32))
    with pytest.raises(TypeError, match=r"^initial_audio_waveforms: from_pipeline has no such argument for StableAu"):
        DDIM.from_pipeline(stable, "a dog", initial_audio_waveforms=torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match=r"^audio_end_in_s: expected a number of seconds from 0 to 32, got 33"):
        DDIM.from_pipeline(stable, "a dog", audio_end_in_s=33)
    with pytest.raises(ValueError, match=r"^audio_end_in_s: expected more than audio_start_in_s=0, and at most 8 seco"):
        DDIM.from_pipeline(stable, "a dog", audio_end_in_s=9.0)
    chain = DDIM.from_pipeline(stable, "a dog", **OPTIONS)
    with pytest.raises(ValueError, match=r"^latents: expected shape \(B, 3, 16\), got \(1, 3, 8\)"):
        chain.decode(torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match=r"^images: expected shape \(B, 2, 32\), the whole length .* got \(1, 2, 31\)"):
        chain.decode.encode(torch.zeros(1, 2, 31))
    with pytest.raises(TypeError, match=r"^images: expected a floating tensor, got torch.int64"):
        chain.decode.encode(torch.zeros(1, 2, 32, dtype=torch.int64))


def test_schedulers_that_do_not_fit_are_refused() -> None:
    ddim = tiny_audio.stable_audio(diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match=r"^scheduler: expected CosineDPMSolverMultistepScheduler, whose timesteps go"):
        DDIM.from_pipeline(ddim, "a dog")
    cosine = tiny_audio.cosine_scheduler()
    for change, shown in (({"prediction_type": "epsilon"}, "'v_prediction'"), ({"sigma_data": 0.5}, "1.0")):
        (key,) = change
        with pytest.raises(ValueError, match=rf"^scheduler: expected CosineDPMSolverMultistepSchedu.* {key}={shown},"):
            DDIM.from_pipeline(tiny_audio.stable_audio(cosine(**change)), "a dog")
    with pytest.warns(RuntimeWarning, match=r"not part of the chain: the noise that it adds in every step; its multis"):
        DDIM.from_pipeline(tiny_audio.stable_audio(), "a dog")
