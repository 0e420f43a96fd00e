"""Loading pipelines, prompts, starting noise, the decoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
import torch
from conftest import golden, relative
from tolerances import FP32
from torch import Tensor, nn

from doodl_fast import EDICT
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.pipeline import Decoder, encode_prompt, initial_latents, load_pipeline, to_pil


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sd")
    tiny_pipeline.stable_diffusion(work / "words").save_pretrained(work / "model")
    return work / "model"


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return load_pipeline(folder)


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# loading


def test_a_saved_pipeline_comes_back_frozen_and_in_eval_mode(folder: Path) -> None:
    pipeline = load_pipeline(str(folder), dtype=torch.bfloat16)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not network.training
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in network.parameters())
    expected = tiny_pipeline.golden_unet().state_dict()["conv_in.weight"].cpu().bfloat16()
    assert torch.equal(pipeline.unet.conv_in.weight, expected)


@pytest.mark.parametrize("upcast", [True, False])
def test_an_sdxl_vae_that_overflows_in_fp16_stays_in_fp32(xl: Any, tmp_path: Path, upcast: bool) -> None:
    xl.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": upcast}))
    pipeline = load_pipeline(tmp_path, dtype=torch.float16)
    assert pipeline.vae.dtype == (torch.float32 if upcast else torch.float16)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == pipeline.text_encoder_2.dtype == torch.float16
    if upcast:
        assert torch.equal(pipeline.vae.decoder.conv_in.weight, xl.vae.decoder.conv_in.weight)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "nowhere", "~/nowhere", "C:\\models"])
def test_a_missing_folder_is_named_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=r"model: the folder .* does not exist \(a hub id has the form org/name\)"):
        load_pipeline(name)


def test_a_hub_id_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model: 'nobody/nothing' is no local folder, and was not found on the hub"):
        load_pipeline("nobody/nothing")


def test_folders_that_are_no_pipelines(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: expected a folder with model_index.json in it"):
        load_pipeline(folder / "unet")
    with pytest.raises(ValueError, match="model: expected a folder, got the file"):
        load_pipeline(folder / "model_index.json")
    with pytest.raises(ValueError, match="model: expected a folder or a hub id"):
        load_pipeline("")
    copy = copied(folder, tmp_path)
    (copy / "model_index.json").write_text("{ not json")
    with pytest.raises(ValueError, match=r"model: the folder .* cannot be loaded"):
        load_pipeline(copy)


def test_a_pipeline_without_a_unet_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer"], index["unet"] = index["unet"], [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model: expected a pipeline with unet.* without unet"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"model: expected model_index.json in .* to hold an object, got list"),
        ('{"unet": 5}', r"model: expected a pipeline with unet.* without unet"),
    ],
)
def test_an_odd_index_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path)


def test_an_inpainting_unet_is_refused(folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    copy = copied(folder, tmp_path)
    config = {**tiny_pipeline.golden_unet().config, "in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    with pytest.raises(ValueError, match=r"model: expected a UNet of 4 input channels .*got 9"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"controlnet": ["diffusers", "ControlNetModel"], "_class_name": "StableDiffusionControlNetXSPipeline"},
            r"model: StableDiffusionControlNetXSPipeline in .* has controlnet, which would be ignored",
        ),
        (
            {"motion_adapter": ["diffusers", "MotionAdapter"], "_class_name": "AnimateDiffVideoToVideoPipeline"},
            r"model: AnimateDiffVideoToVideoPipeline in .* makes videos",
        ),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "makes videos, which is not supported"),
    ],
)
def test_what_would_be_ignored_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pickles_are_never_read(folder: Path, tmp_path: Path, component: str) -> None:
    copy = copied(folder, tmp_path)
    (weights,) = (copy / component).glob("*.safetensors")
    name = "diffusion_pytorch_model.bin" if component == "unet" else "pytorch_model.bin"
    from safetensors.torch import load_file

    torch.save(load_file(weights), copy / component / name)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model: the folder .* cannot be loaded: .*(no file named|safetensors)"):
        load_pipeline(copy)


# prompts


def test_prompts_are_encoded_as_the_pipeline_does(pipeline: Any) -> None:
    cond, uncond, extra = encode_prompt(pipeline, "a dog", "ugly")
    ids = pipeline.tokenizer(
        ["a dog", "ugly"], padding="max_length", max_length=tiny_pipeline.WORDS, return_tensors="pt"
    )
    with torch.no_grad():
        both = pipeline.text_encoder(ids.input_ids)[0]
    assert extra == {}
    assert relative(torch.cat([cond, uncond]), both) < 1e-6
    assert not cond.requires_grad
    assert cond.shape == (1, tiny_pipeline.WORDS, 16)
    assert not torch.equal(uncond, encode_prompt(pipeline, "a dog")[1])


def test_several_prompts_are_a_batch(pipeline: Any) -> None:
    cond, uncond, _ = encode_prompt(pipeline, ["a dog", "a cat"], "ugly")
    assert cond.shape[0] == uncond.shape[0] == 2
    assert relative(cond[1:], encode_prompt(pipeline, "a cat")[0]) < 1e-6


@pytest.mark.parametrize(("prompt", "negative"), [(3, ""), ("", 3), ([], ""), ([b"dog"], "")])
def test_a_prompt_that_is_no_text_is_refused(pipeline: Any, prompt: Any, negative: Any) -> None:
    with pytest.raises(TypeError, match="prompt: expected a string or a list of strings"):
        encode_prompt(pipeline, prompt, negative)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sdxl_conditions_reach_the_right_half(xl: Any, batch: int) -> None:
    """Against separate calls of the UNet with the pipeline's own embeddings; two latents are the ambiguous case."""
    cond, uncond, extra = encode_prompt(xl, "a dog", "ugly", height=128, width=64, batch=batch)
    x = torch.randn(batch, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    eps = Denoiser(xl.unet, cond, uncond, 3.0, **extra)(x, 500)
    embedded = xl.encode_prompt("a dog", negative_prompt="ugly", device="cpu")
    time_ids = torch.tensor([[128, 64, 0, 0, 128, 64]] * batch).float()

    def single(states: Tensor, pooled: Tensor) -> Tensor:
        added = {"text_embeds": pooled.expand(batch, -1), "time_ids": time_ids}
        states = states.expand(batch, -1, -1)
        with torch.no_grad():
            return xl.unet(x, 500, encoder_hidden_states=states, added_cond_kwargs=added).sample

    eps_cond, eps_uncond = single(embedded[0], embedded[2]), single(embedded[1], embedded[3])
    assert relative(eps_cond, eps_uncond) > 1e-2
    assert relative(eps, eps_uncond + 3 * (eps_cond - eps_uncond)) < FP32


def test_sdxl_without_a_negative_prompt_gets_the_pipelines_zeros(xl: Any) -> None:
    _, uncond, extra = encode_prompt(xl, "a dog")
    assert not uncond.any()
    assert not extra["added_cond_kwargs"]["text_embeds"][0].any()
    assert extra["added_cond_kwargs"]["time_ids"].tolist() == [[128, 128, 0, 0, 128, 128]] * 2


# starting noise


def test_noise_depends_on_the_seed_alone(pipeline: Any) -> None:
    torch.manual_seed(1)
    first = initial_latents(pipeline, seed=5)
    assert first.shape == (1, 4, 16, 16)
    assert torch.equal(initial_latents(pipeline, seed=5, dtype=torch.float16), first.half())
    assert not torch.equal(initial_latents(pipeline, seed=6), first)
    many = initial_latents(pipeline, 256, 512, batch=4)
    assert many.shape == (4, 4, 32, 64)
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02


def test_a_seed_for_each_picture_gives_its_noise_in_every_batch(pipeline: Any) -> None:
    chain = EDICT.from_pipeline(pipeline, "a dog", num_inference_steps=2)
    together = chain.noise(seed=[5, 7, 5])
    assert torch.equal(together, torch.cat([chain.noise(seed) for seed in (5, 7, 5)]))
    assert torch.equal(chain.noise(seed=np.int64(5)), chain.noise(seed=5))
    drawn = chain.noise(seed=None, generator=torch.Generator().manual_seed(5))  # type: ignore[arg-type]
    assert torch.equal(drawn, chain.noise(seed=5))
    for seed in ([], 1.5, [1, "a"], True):
        with pytest.raises(ValueError, match="seed: expected an int, or a list of ints, one for each picture, got"):
            chain.noise(seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed: expected one seed, or 3, one for each picture, got 2"):
        chain.noise(seed=[1, 2], batch=3)


@pytest.mark.parametrize("size", [0, -8, 7, 130, 128.0, True])
def test_odd_sizes_are_refused(pipeline: Any, size: Any) -> None:
    with pytest.raises(ValueError, match=r"height: expected a positive multiple of 8 .*got"):
        initial_latents(pipeline, height=size)
    with pytest.raises(ValueError, match=r"width: expected a positive multiple of 8 .*got"):
        initial_latents(pipeline, width=size)
    with pytest.raises(ValueError, match="batch: expected an int of at least 1, got 0"):
        initial_latents(pipeline, batch=0)


def test_sizes_that_the_unet_cannot_halve_evenly_work(pipeline: Any) -> None:
    latents = initial_latents(pipeline, 120, 72)
    cond, uncond, _ = encode_prompt(pipeline, "a dog")
    with torch.no_grad():
        assert Denoiser(pipeline.unet, cond, uncond)(latents, 500).shape == (1, 4, 15, 9)


# the decoder


def test_the_decoder_matches_the_recording() -> None:
    images = Decoder(tiny_pipeline.golden_vae())(golden("models")["check/vae_latent"])
    assert images.shape == (1, 3, 512, 512)
    assert relative(images[..., ::8, ::8], golden("models")["check/vae_image_sub8"]) < 2e-6


def test_the_decoder_differentiates_latents_and_leaves_the_weights_alone(folder: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae").train()
    vae.decoder.conv_in.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in vae.named_parameters()}
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    images = Decoder(vae)(latents)
    assert vae.training and vae.decoder.mid_block.training
    images.square().mean().backward()
    assert {name: p.requires_grad for name, p in vae.named_parameters()} == flags
    assert all(p.grad is None for p in vae.parameters())
    assert latents.grad is not None and latents.grad.norm() > 0
    with pytest.raises(RuntimeError):
        Decoder(SimpleNamespace(config=vae.config, dtype=torch.float32, decode=vae.decode))(
            latents.bfloat16()[:, :, :0]
        )
    assert {name: p.requires_grad for name, p in vae.named_parameters()} == flags


def test_gradients_through_a_half_decoder_do_not_underflow() -> None:
    """A mean over 256 x 256 x 3 numbers, times 1e-3, gives cotangents of 1e-8: fp16's subnormals."""
    half, double = tiny_pipeline.golden_vae_copy(torch.float16), tiny_pipeline.golden_vae_copy(torch.float16).double()
    latents = golden("models")["check/vae_latent"][..., :32, :32]

    def gradient(function: Any, dtype: torch.dtype) -> Tensor:
        leaf = latents.to(dtype).requires_grad_()
        return torch.autograd.grad(1e-3 * function(leaf).double().square().mean(), leaf)[0]

    truth = gradient(Decoder(double), torch.float64)
    scaled = relative(gradient(Decoder(half), torch.float32), truth)
    plain = relative(gradient(lambda z: half.decode((z / 0.18215).half()).sample, torch.float32), truth)
    assert scaled < 1e-2
    assert plain > 5 * scaled


class LinearVae(nn.Module):
    """decode: latents -> twice the first three channels; encode: its inverse, posterior of deviation 0.5."""

    def __init__(self, dtype: torch.dtype = torch.float32, **config: Any) -> None:
        super().__init__()
        self.dtype = dtype
        settings = {"scaling_factor": 0.25, "latent_channels": 3, "block_out_channels": (1, 1), **config}
        self.config = SimpleNamespace(**settings)

    def decode(self, z: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        assert z.dtype == self.dtype
        return (2 * z,)

    def encode(self, images: Tensor) -> Any:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        mean = images / 2
        variance = torch.full_like(mean, 0.25).log()
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, variance], 1)))


def test_scale_shift_and_channel_statistics_come_from_the_config() -> None:
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.allclose(Decoder(LinearVae(torch.float64))(z), 2 * z / 0.25)
    assert torch.allclose(Decoder(LinearVae(torch.float64, shift_factor=0.1))(z), 2 * (z / 0.25 + 0.1))
    mean, deviation = [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]
    m, d = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in (mean, deviation))
    decoder = Decoder(LinearVae(torch.float64, latents_mean=mean, latents_std=deviation))
    assert torch.allclose(decoder(z), 2 * (z * d / 0.25 + m))
    for config in ({}, {"shift_factor": 0.1}, {"latents_mean": mean, "latents_std": deviation}):
        decoder = Decoder(LinearVae(torch.float64, **config))
        assert torch.allclose(decoder.encode(decoder(z)), z)


def test_encoding_takes_the_mean_unless_a_sample_is_asked_for() -> None:
    decoder, images = Decoder(LinearVae()), torch.rand(2, 3, 64, 64)
    assert torch.equal(decoder.encode(images), decoder.encode(images))
    draws = [decoder.encode(images, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    spread = float((decoder.encode(images, sample=True) - decoder.encode(images)).std())
    assert spread == pytest.approx(0.5 * 0.25, rel=0.05)


def test_the_decoders_errors() -> None:
    decoder = Decoder(tiny_pipeline.golden_vae())
    with pytest.raises(ValueError, match=r"latents: expected shape \(B, 4, height, width\), got \(4, 8, 8\)"):
        decoder(torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match=r"images: expected height and width in multiples of 8"):
        decoder.encode(torch.zeros(1, 3, 60, 64))
    with pytest.raises(TypeError, match=r"latents: expected a floating tensor, got torch.int64"):
        decoder(torch.zeros(1, 4, 8, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="vae: expected a diffusers autoencoder"):
        Decoder(nn.Identity())
    with pytest.raises(ValueError, match=r"overflows in fp16.*vae\.float\(\)"):
        Decoder(LinearVae(torch.float16))(torch.full((1, 3, 2, 2), 3e4))


def test_pictures_are_clipped_and_rounded() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).reshape(1, 1, 2, 3).expand(2, 3, 2, 3)
    pictures = to_pil(images)
    assert len(pictures) == 2 and pictures[0].size == (3, 2)
    assert np.array(pictures[0])[..., 0].tolist() == [[0, 0, 128], [191, 255, 255]]
