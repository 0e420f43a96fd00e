"""`compat.edict`, `EDICTPipeline` and `EDICTScheduler` against numbers that EDICT's own code and the community pipeline
gave (tests/golden/edict.safetensors, recorded by bench/record_edict.py)."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
import torch
from conftest import DEVICE, golden, golden_unet, relative, sd_scheduler
from PIL import Image
from torch import Tensor

import doodl_fast
from doodl_fast.compat import edict
from doodl_fast.compat.edict import (
    EDICT_editing,
    coupled_stablediffusion,
    im_to_np,
    load_im_into_format_from_path,
    recon_test,
)
from doodl_fast.compat.edict_pipeline import EDICTPipeline
from doodl_fast.compat.edict_scheduler import EDICTScheduler
from doodl_fast.diffusion.denoiser import Denoiser

CASES: dict[str, dict[str, Any]] = {
    "edict": {"steps": 10},
    "edict_30": {"steps": 30},
    "edict_together": {"steps": 10, "leapfrog_steps": False, "mix_weight": 0.8},
    "ddim": {"steps": 10, "run_baseline": True},
}


def embeddings() -> dict[bool, Tensor]:
    models = golden("models")
    return {True: models["embedding_conditional"].double(), False: models["embedding_unconditional"].double()}


def pipeline() -> Any:
    """The recorded networks in float64. The prompt "a dog" has one of the recorded embeddings, and "" the other."""

    def encode_prompt(prompt: list[str], negative_prompt: Any, **_: Any) -> tuple[Tensor, Tensor]:
        known = embeddings()
        return known[bool(prompt[0])], known[bool(negative_prompt)]

    return SimpleNamespace(
        unet=golden_unet(torch.float64),
        vae=tiny_pipeline.golden_vae(torch.float64),
        scheduler=sd_scheduler(),
        encode_prompt=encode_prompt,
    )


def run(prompt: str = "a dog", **options: Any) -> Any:
    given = {"guidance_scale": 3.0, "width": 64, "height": 64, "pipeline": pipeline(), **options}
    return coupled_stablediffusion(prompt, **given)


@pytest.mark.parametrize("case", CASES)
def test_generation_inversion_and_editing_are_edicts(case):
    recorded, options = golden("edict"), CASES[case]
    made = run(fixed_starting_latent=recorded["start"], return_latents=True, **options)
    assert relative(torch.cat(made), recorded[f"{case}/generated"]) < 1e-9
    given = list(recorded[f"{case}/generated"].split(1))
    noise = run(reverse=True, init_image=given, init_image_strength=0.7, **options)
    assert relative(torch.cat(noise), recorded[f"{case}/inverted"]) < 1e-9
    given = list(recorded[f"{case}/inverted"].split(1))
    again = run("", fixed_starting_latent=given, init_image_strength=0.7, return_latents=True, **options)
    assert relative(torch.cat(again), recorded[f"{case}/edited"]) < 1e-9
    assert relative(torch.cat(again), recorded[f"{case}/generated"]) > 1e-4  # The prompt matters.


def test_pictures_are_edicts():
    recorded = golden("edict")
    pictures = run(fixed_starting_latent=recorded["start"], steps=4)
    for picture, expected in zip(pictures, recorded["edict/pictures"], strict=True):
        assert np.abs(np.asarray(picture).astype(int) - expected.cpu().numpy().astype(int)).max() <= 1


def test_a_picture_comes_back_from_its_inversion():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    common: dict[str, Any] = {"steps": 10, "pipeline": pipeline()}
    latents = run(reverse=True, init_image=picture, init_image_strength=0.5, **common)
    again = run(fixed_starting_latent=latents, init_image_strength=0.5, return_latents=True, **common)
    encoded = run(reverse=True, init_image=picture, steps=0)
    assert relative(again[0], encoded) < 1e-9 and relative(again[1], encoded) < 1e-9


@pytest.fixture
def small(monkeypatch):
    """Pictures of 64 x 64 pixels in the functions that have no argument for it."""
    monkeypatch.setattr(edict, "coupled_stablediffusion", partial(coupled_stablediffusion, width=64, height=64))


def test_the_error_of_a_reconstruction(small):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    errors = [recon_test(picture, 4, run_baseline=one, mix_weight=0.93, pipeline=pipeline()) for one in (False, True)]
    # The tiny VAE decodes what it has encoded badly; DDIM adds its own error, and EDICT none.
    vae = pipeline().vae
    pixels = torch.from_numpy(im_to_np(picture)).permute(2, 0, 1)[None].to(DEVICE)
    latents = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    decoded = vae.decode(latents).sample.detach().clamp(-1, 1)
    assert abs(errors[0] - float((decoded - pixels).square().mean())) < 1e-3
    assert abs(errors[1] - errors[0]) > 1e-6


def test_editing_takes_files_and_pictures(tmp_path, small):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    loaded = load_im_into_format_from_path(tmp_path / "picture.png")
    assert loaded.size == (512, 512) and im_to_np(loaded).min() >= -1
    options: dict[str, Any] = {"steps": 2, "init_image_strength": 1.0, "pipeline": pipeline()}
    ours, same = (EDICT_editing(source, "a dog", "", **options) for source in (tmp_path / "picture.png", loaded))
    assert [np.asarray(one).tobytes() for one in ours] == [np.asarray(one).tobytes() for one in same]
    unedited = EDICT_editing(loaded, "a dog", "a dog", **options)
    assert np.asarray(unedited[0]).tobytes() != np.asarray(ours[0]).tobytes()


def test_a_seed_gives_the_same_noise_and_none_another():
    first, second = (run(steps=1, return_latents=True, seed=4)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(run(steps=1, return_latents=True, seed=None)[0], first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_edit": "a cat"}, "prompt_edit: expected None.*Prompt-to-Prompt"),
        ({"prompt_edit_token_weights": [(1, 2.0)]}, "prompt_edit_token_weights: expected none"),
        ({"use_lms": True}, "use_lms: expected False"),
        ({"beta_schedule": "linear"}, "beta_schedule: expected 'scaled_linear'"),
        ({"reverse": True}, "init_image: expected a picture with reverse=True"),
        ({"init_image": torch.zeros(1, 4, 8, 8)}, "init_image: expected None with reverse=False"),
        ({"reverse": True, "init_image": "dog.png"}, "init_image: expected a PIL picture or latents, got str"),
        ({"steps": -1}, "steps: expected an int from 0 to 1000, got -1"),
        ({"init_image_strength": 2}, "init_image_strength: expected a number from 0 to 1, got 2"),
        ({"width": 63}, "width: expected at least 64 pixels"),
    ],
)
def test_what_is_not_supported_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_prompt_to_prompt_is_refused_by_editing():
    with pytest.raises(ValueError, match="use_p2p: expected False"):
        EDICT_editing(None, "a dog", "a cat", use_p2p=True)
    with pytest.raises(ValueError, match="back_and_forth: expected False"):
        recon_test(None, back_and_forth=True)


def community(steps: int, leapfrog: bool = True, **scheduler: Any) -> EDICTPipeline:
    """`EDICTPipeline` on the recorded networks in float64."""

    class Text(torch.nn.Module):
        dtype, device = torch.float64, DEVICE

        def forward(self, ids: Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=embeddings()[bool(ids)])

    class Tokenizer:
        model_max_length = 8

        def __call__(self, text: str, **_: Any) -> Any:
            return SimpleNamespace(input_ids=torch.tensor([[int(bool(text))]]))

    parts = {"unet": golden_unet(torch.float64), "vae": tiny_pipeline.golden_vae(torch.float64)}
    parts |= {"tokenizer": Tokenizer(), "text_encoder": Text(), "scheduler": sd_scheduler(**scheduler)}
    return EDICTPipeline(**parts, leapfrog_steps=leapfrog)


@pytest.mark.parametrize("leapfrog", [True, False])
@pytest.mark.parametrize(("name", "steps", "strength"), [("offset", 10, 0.8), ("plain", 12, 0.5)])
def test_the_community_pipelines_latents(name, steps, strength, leapfrog):
    recorded = golden("edict")
    pipe = community(steps, leapfrog, **({"steps_offset": 1} if name == "offset" else {}))
    options = {"num_inference_steps": steps, "strength": strength, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    picture = (recorded["community/picture"] + 1) / 2
    latents = pipe("a dog", "", picture, generator=generator, **options)
    assert relative(latents, recorded[f"community/{name}/{'alternating' if leapfrog else 'together'}"]) < 1e-6
    # The community pipeline computes the coefficients of its steps in float32.


@pytest.mark.parametrize("strength", [0.3, 0.4])
def test_an_odd_number_of_steps_is_undone_as_well(strength):
    pipe, picture = community(10), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    options: dict[str, Any] = {"num_inference_steps": 10, "output_type": "latent"}
    again = pipe("a dog", "a dog", picture, strength=strength, generator=generators[0], **options)
    encoded = pipe("a dog", "a dog", picture, strength=0.0, generator=generators[1], **options)
    assert relative(again, encoded) < 1e-10


def test_the_community_pipelines_outputs_and_errors():
    pipe = community(4)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    options: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.5}
    found = {}
    for kind in ("pil", "np", "pt"):
        generator = torch.Generator().manual_seed(0)
        found[kind] = pipe("a dog", "", picture, output_type=kind, generator=generator, **options)
    assert found["pil"][0].size == (64, 64) and found["np"].shape == (1, 64, 64, 3)
    assert np.abs(np.asarray(found["pil"][0]) / 255 - found["np"][0]).max() < 0.003
    assert torch.equal(found["pt"][0].permute(1, 2, 0).float().cpu(), torch.from_numpy(found["np"][0]).float())
    with pytest.raises(ValueError, match="strength: expected a number from 0 to 1, got 2"):
        pipe("a dog", "", picture, strength=2)
    with pytest.raises(ValueError, match="output_type: expected one of latent, pt, np, pil, got 'tuple'"):
        pipe("a dog", "", picture, output_type="tuple")


def test_the_pipeline_is_made_of_the_parts_of_another(tmp_path):
    pipe = EDICTPipeline(**tiny_parts(tmp_path))
    assert pipe.components.keys() == {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
    before = copy.deepcopy(pipe.unet.state_dict())
    picture = Image.new("RGB", (64, 64), "red")
    edited = pipe("a dog", "a cat", picture, num_inference_steps=2, strength=0.5)
    assert edited[0].size == (64, 64)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def tiny_parts(folder: Any) -> dict[str, Any]:
    made = tiny_pipeline.stable_diffusion(folder)
    return {name: getattr(made, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}


def test_steps_and_mixings_of_the_scheduler():
    recorded = golden("edict")
    base, other, noise = (recorded[f"steps/{name}"] for name in ("base", "other", "noise"))
    scheduler = EDICTScheduler()
    with pytest.raises(ValueError, match="num_inference_steps: the scheduler has no timesteps yet"):
        scheduler.denoise_step(base, other, noise, 0)
    scheduler.set_timesteps(12)
    assert scheduler.timesteps.tolist() == sd_timesteps(12)
    for t in (0, 83, 913):
        for name, step in (("denoised", scheduler.denoise_step), ("noised", scheduler.noise_step)):
            same, moved = step(base, other, noise, torch.tensor(t))
            assert same is other and relative(moved, recorded[f"steps/{t}/{name}"]) < 1e-6, (t, name)
    assert relative(torch.cat(scheduler.denoise_mixing_layer(base, other)), recorded["steps/mixed"]) < 1e-14
    assert relative(torch.cat(scheduler.noise_mixing_layer(base, other)), recorded["steps/unmixed"]) < 1e-14


def sd_timesteps(steps: int) -> list[int]:
    scheduler = sd_scheduler()
    scheduler.set_timesteps(steps)
    return list(scheduler.timesteps.tolist())


def test_a_loop_over_the_scheduler_is_the_chain_of_its_schedule():
    known, unet = embeddings(), golden_unet(torch.float64)
    denoiser = Denoiser(unet, known[True], known[False], 3.0)
    scheduler = EDICTScheduler(p=0.9)
    scheduler.set_timesteps(4)
    x = golden("edict")["start"].clone().requires_grad_()
    pair = [x, x]
    for i, t in enumerate(scheduler.timesteps.tolist()):
        for k in (0, 1) if i % 2 == 0 else (1, 0):
            _, pair[k] = scheduler.denoise_step(pair[k], pair[1 - k], denoiser(pair[1 - k], t), t)
        pair = scheduler.denoise_mixing_layer(*pair)
    (gradient,) = torch.autograd.grad(pair[0].square().sum(), x)
    chain = doodl_fast.EDICT(denoiser, scheduler.schedule(), mix_weight=0.9)
    other = golden("edict")["start"].clone().requires_grad_()
    ends = chain(other)
    (ours,) = torch.autograd.grad(ends[0].square().sum(), other)
    assert relative(ends[0], pair[0]) < 1e-12 and relative(ours, gradient) < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDICTScheduler(p=0), r"p: expected a number in \(0, 1\], got 0"),
        (lambda: EDICTScheduler().set_timesteps(0), "num_inference_steps: expected an int from 1 to 1000, got 0"),
    ],
)
def test_the_schedulers_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
