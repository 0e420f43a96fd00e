"""The options of `gen`: those that stop the reference, types of guidance, quirks, and what `gen` leaves alone."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
import torch
from conftest import DEVICE, golden, relative
from PIL import Image
from recorded_gen import errors, picture, pipeline, quick, run
from torch import Tensor, nn

from doodl_fast import shapes
from doodl_fast.compat import Quirks, conditioning
from doodl_fast.compat.conditioning import get_generic_cond_fn
from doodl_fast.compat.gen import gen
from doodl_fast.compat.losses import symmetry_loss_fn
from doodl_fast.compat.start import source_pixels
from doodl_fast.diffusion.pipeline import Decoder

# Options that stop the reference


def test_traversal_without_guidance_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("x_traversal_grad_scale0", tmp_path, monkeypatch)
    assert errors("x_traversal_grad_scale0", result, tmp_path)["image"] <= 1
    assert [file.name for file in result.files] == ["x_0.png"] and result.losses == []
    assert result.optimization is None


def test_without_traversal_momentum_and_renormalisation_are_of_no_effect() -> None:
    off = gen(**quick(latent_traversal=False, one_step_baseline=True, use_momentum=False, renormalize_latents=False))
    on = gen(**quick(latent_traversal=False, one_step_baseline=True))
    assert torch.equal(on.images[0], off.images[0])


def test_editing_renormalises_to_the_inverted_latents() -> None:
    result = gen(**quick(source_im=picture(), num_traversal_steps=2))
    start = Quirks(averaged_inversion=False)
    apart = gen(**quick(source_im=picture(), num_traversal_steps=2, quirks=start))
    norms = [float(z.norm()) for z in apart.latents]
    assert not torch.equal(*apart.latents)
    assert float(result.latents[0].norm()) == pytest.approx(sum(norms) / 2, rel=1e-6)


@pytest.mark.parametrize("opt_t", [0, 1, 3])
def test_editing_at_a_timestep_of_ones_choice(opt_t: int) -> None:
    """The first picture is the source picture, because the inversion is that of the steps that follow."""
    options = quick(source_im=picture(), renormalize_latents=False, grad_scale=0, steps=5, sd_guidance_scale=1.0)
    result = gen(**options, opt_t=opt_t)
    encoded = Decoder(tiny_pipeline.golden_vae())
    torch.manual_seed(0)
    expected = encoded.encode(source_pixels(picture(), 64, Quirks()).float().to(DEVICE), sample=True)
    with torch.no_grad():
        assert relative(result.images[0], encoded(expected)) < 1e-4
    assert relative(result.latents[0], gen(**options).latents[0]) > 1e-2


@pytest.mark.parametrize("mode", ["L", "P", "LA", "1"])
def test_other_pictures_are_converted(mode: str) -> None:
    pixels = source_pixels(picture(mode), 32, Quirks())
    assert pixels.shape == (1, 3, 32, 32)
    result = gen(**quick(source_im=picture(mode), grad_scale=0))
    assert result.images[0].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"single_variable": True}, "single_variable: expected latent_traversal=False with it"),
        ({"model_guidance_type": "other"}, "model_guidance_type: expected one of 'CLIP', 'fgvc', .*, got 'other'"),
        (
            {"model_guidance_type": "CLIP", "model_guidance_dict": {"clip_prompt": "a cat", "clip_model_str": "other"}},
            "clip_model_str: expected one of vit_b_32, .*, got 'other'",
        ),
        ({"model_guidance_type": "CLIP"}, "prompt, clip_viz_paths: expected one of them .as gen: clip_prompt or"),
        ({"model_guidance_type": "fgvc"}, "model: expected a classifier for dataset=None, got none"),
        ({"model_guidance_dict": {"symmetry_type": "other"}}, "direction: expected one of 'horizontal', 'vertical'"),
        ({"save_interval": 0}, "save_interval: expected an int of at least 1, got 0"),
        ({"num_traversal_steps": 0}, "num_traversal_steps: expected an int of at least 1, got 0"),
        ({"opt_t": -1}, "opt_t: expected an int of at least 0, got -1"),
        ({"size": 60}, "size: expected a positive multiple of 8 .the VAE's scale factor., got 60"),
        ({"grad_scale": float("nan")}, "grad_scale: expected a finite number, got nan"),
        ({"clip_grad_val": 0}, "clip_grad_val: expected a positive number, or None, got 0"),
        ({"perturb_grad_scale": -1.0}, "perturb_grad_scale: expected a number of at least 0, got -1.0"),
        ({"steps": 0}, "num_inference_steps: expected an int from 1 to 1000, got 0"),
        ({"source_im": "none.png"}, "source_im: the file 'none.png' does not exist"),
        (
            {"one_step_baseline": True, "quirks": Quirks(ignored_one_step_baseline=False)},
            "one_step_baseline: expected latent_traversal=False with it",
        ),
        (
            {"latent_traversal": False, "opt_t": 2, "quirks": Quirks(ignored_opt_t=False)},
            "opt_t: expected latent_traversal=True or source_im with it",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gen(**quick(**options))


def test_other_sources_than_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"source_im: the file .*text.png' is no picture that PIL can read"):
        source_pixels(tmp_path / "text.png", 64, Quirks())
    with pytest.raises(TypeError, match="source_im: expected a file or a PIL picture, got ndarray"):
        source_pixels(np.zeros((4, 4, 3)), 64, Quirks())


# Types of guidance


def test_the_fine_grained_type_takes_any_classifier() -> None:
    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = x.mean((1, 2, 3))
            return torch.stack([-level, level], 1)

    given = {"dataset": "dog", "class": 1, "model": Bright()}
    options = quick(model_guidance_type="fgvc", model_guidance_dict=given, num_cuts=2, clip_grad_val=None)
    result = gen(**{**options, "num_traversal_steps": 2, "renormalize_latents": False})
    assert result.optimization is not None
    assert result.optimization.final_loss < result.optimization.losses[0]


def test_the_embedded_pipeline_and_its_guides(tmp_path: Path) -> None:
    """`gen` runs with a real tokenizer, CLIP and a classifier from folders, and an aesthetic head from a file."""
    clip = str(shapes.WEIGHTS / "clip")
    model, _ = shapes.load_clip()
    head = nn.Linear(model.config.projection_dim, 1)
    nn.init.constant_(head.bias, 5.0)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    options = quick(pipeline=shapes.load_pipeline(), cond_prompt="a red star", num_cuts=2, steps=3, save_str="a.png")
    for number, (kind, given) in enumerate(
        [
            ("CLIP", {"clip_prompt": "a blue circle", "clip_model_str": clip}),
            ("CLIP", {"clip_viz_paths": [str(tmp_path / "red.png")], "clip_models": {"vit_g_14": clip}}),
            ("aesthetic", {"clip_models": {"vit_l_14": clip}, "aesthetic_heads": str(tmp_path / "head.pth")}),
            ("fgvc", {"model": shapes.WEIGHTS / "classifier", "class": 3}),
            ("symmetry", {"symmetry_type": "vertical"}),
        ]
    ):
        folder = tmp_path / str(number)
        result = gen(**{**options, "model_guidance_type": kind, "model_guidance_dict": given, "folder": folder})
        assert [file.name for file in folder.iterdir()] == ["a_0.png"]
        assert np.isfinite(result.losses).all() and len(result.losses) == 2
        assert result.image.size == (64, 64)
        assert result.latents[0].shape == (1, 4, 16, 16)


# Quirks


def test_first_image_only_halves_its_gradient() -> None:
    options = quick(optimize_first_edict_image_only=True, clip_grad_val=None, renormalize_latents=False)
    start = gen(**{**options, "grad_scale": 0}).latents[0]
    halved = gen(**options).latents[0] - start
    whole = gen(**options, quirks=Quirks(half_gradient_of_first_image=False)).latents[0] - start
    assert relative(2 * halved, whole) < 1e-3


def test_the_norm_that_latents_at_a_timestep_are_scaled_to() -> None:
    options = quick(opt_t=1)
    noise = gen(**quick(grad_scale=0)).latents[0].norm()
    assert float(gen(**options).latents[0].norm() / noise) == pytest.approx(1, rel=1e-6)
    own = gen(**options, quirks=Quirks(renormalized_to_noise=False)).latents[0].norm()
    unchanged = gen(**{**options, "grad_scale": 0}).latents[0].norm()
    assert float(own / unchanged) == pytest.approx(1, rel=1e-6)
    assert abs(float(own / noise) - 1) > 1e-2


@pytest.mark.parametrize(("opt_t", "steps"), [(None, 4), (1, 4), (None, 30)])
def test_an_unguided_edit_comes_back_without_the_quirks_of_inversion(opt_t: int | None, steps: int) -> None:
    """With the quirks it does not come back."""
    decoder = Decoder(tiny_pipeline.golden_vae())
    torch.manual_seed(0)
    source = decoder.encode(source_pixels(picture(), 64, Quirks()).float().to(DEVICE), sample=True)
    options = quick(source_im=picture(), latent_traversal=False, grad_scale=0, opt_t=opt_t, steps=steps)
    options["sd_guidance_scale"] = 1.0
    exact = gen(**options, quirks=Quirks(unmixed_inversion=False, inverse_order_by_count=False))
    assert relative(exact.latents[0], source) < 1e-4
    assert relative(gen(**options).latents[0], source) > 1e-3


def test_opt_t_skips_steps_or_counts_them() -> None:
    calls: list[int] = []
    options = quick(source_im=picture(), latent_traversal=False, grad_scale=0, steps=5, opt_t=1)
    unet = options["pipeline"].unet
    handle = unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        gen(**options)
        skipping = len(calls)
        gen(**options, quirks=Quirks(skipping_opt_t=False))
    finally:
        handle.remove()
    # Each step has two evaluations in each direction, and the one at t = 0 has none.
    assert (skipping, len(calls) - skipping) == (2 * 2 * 3, 0)


def test_order_by_index() -> None:
    """An optimisation of the last three of four steps has the order of the whole chain, or starts a new one."""
    options = quick(opt_t=3, grad_scale=0, sd_guidance_scale=2.0, tied_latents=False)
    whole = gen(**quick(grad_scale=0, sd_guidance_scale=2.0, tied_latents=False))
    by_place = gen(**options, quirks=Quirks(order_by_index=False))
    assert torch.allclose(by_place.images[0], whole.images[0], atol=1e-5)
    restarted = gen(**options)
    assert not torch.allclose(restarted.images[0], whole.images[0], atol=1e-5)


def test_transparency() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    white = source_pixels(clear, 4, Quirks(signed_alpha=False))
    assert torch.allclose(white, torch.ones(1, 3, 4, 4, dtype=torch.float64))
    signed = source_pixels(clear, 4, Quirks())
    assert signed[0, :, 0, 0].tolist() == [-1 + 2, 1 + 2, 1 + 2]  # colour * -1 + (1 - -1)
    opaque = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    for quirks in (Quirks(), Quirks.none()):
        assert source_pixels(opaque, 4, quirks)[0, :, 0, 0].tolist() == [1, -1, -1]


def test_sources_are_turned_upright_and_cropped_to_their_middle(tmp_path: Path) -> None:
    wide = Image.new("RGB", (96, 32), "blue")
    wide.paste("red", (32, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    wide.save(tmp_path / "wide.png", exif=exif)
    for source in (wide, str(tmp_path / "wide.png"), tmp_path / "wide.png"):
        pixels = source_pixels(source, 32, Quirks())
        assert pixels[0, :, 8:24, 8:24].flatten(1).mean(1).tolist() == [1, -1, -1]


# Other properties


def test_the_same_seed_gives_the_same_pictures() -> None:
    options = quick(perturb_grad_scale=1e-2, num_traversal_steps=2, clip_grad_val=None)
    first, again = gen(**options), gen(**options)
    assert torch.equal(first.images[0], again.images[0])
    other = gen(**{**options, "seed": 1, "latent_seed": 0})
    assert not torch.equal(first.images[0], other.images[0])
    nesterov = gen(**options, use_momentum=False, use_nesterov=True)
    plain = gen(**options, use_momentum=False)
    assert not torch.equal(nesterov.latents[0], plain.latents[0])


def test_nothing_of_the_callers_changes() -> None:
    options = quick()
    weights = [*options["pipeline"].unet.parameters(), *options["pipeline"].vae.parameters()]
    flags = [weight.requires_grad for weight in weights]
    gen(**options)
    assert torch.is_grad_enabled()
    assert all(weight.grad is None for weight in weights)
    assert flags == [weight.requires_grad for weight in weights]


def test_the_conditioning_function_of_a_pair() -> None:
    models = golden("models")
    embeddings = models["embedding_unconditional"], models["embedding_conditional"]
    loss_fn = symmetry_loss_fn("horizontal", 1.0)
    cond_fn = get_generic_cond_fn(loss_fn, *embeddings, steps=4, pipeline=pipeline())
    latent = golden("gen")["init/latent"][..., :8, :8]
    t = torch.tensor([500.0])
    single = cond_fn(latent, t, None)
    pair = cond_fn(latent.repeat(2, 1, 1, 1), t, None)
    assert single.shape == (1, 4, 8, 8) and pair.shape == (2, 4, 8, 8)
    assert relative(pair.sum(0, keepdim=True), single) < 1e-6
    one_step = get_generic_cond_fn(loss_fn, *embeddings, steps=4, one_step_baseline=True, pipeline=pipeline())
    assert relative(one_step(latent, t, None), single) > 1e-2
    with pytest.raises(ValueError, match="t: expected one of the 4 timesteps of 4 steps, got 400"):
        cond_fn(latent, 400, None)


def test_other_noise_levels_than_stable_diffusions() -> None:
    ours = pipeline()
    schedule = conditioning.pipeline_schedule(ours, 10, Quirks())
    ours.scheduler = ours.scheduler.from_config(ours.scheduler.config, beta_start=0.001, prediction_type="v_prediction")
    other = conditioning.pipeline_schedule(ours, 10, Quirks())
    assert other.timesteps == schedule.timesteps and other.prediction_type == "v_prediction"
    expected = ours.scheduler.alphas_cumprod.double()
    assert other.alphas_cumprod == tuple(float(expected[t]) for t in other.timesteps)
    ours.scheduler = ours.scheduler.from_config(ours.scheduler.config, num_train_timesteps=500)
    with pytest.raises(ValueError, match="pipeline: expected a scheduler of 1000 training timesteps, got 500"):
        conditioning.pipeline_schedule(ours, 10, Quirks())
    ours.scheduler = None
    with pytest.raises(TypeError, match="scheduler: expected a diffusers scheduler"):
        conditioning.pipeline_schedule(ours, 10, Quirks())


def test_a_pipeline_is_loaded_when_none_is_given_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        return pipeline()

    conditioning.default_pipeline.cache_clear()
    monkeypatch.setattr(conditioning, "load_pipeline", load)
    for _ in range(2):
        gen(**quick(pipeline=None, grad_scale=0))
    conditioning.default_pipeline.cache_clear()
    assert len(asked) == 1 and asked[0][0] == "CompVis/stable-diffusion-v1-4"
    program = (
        "import sys, doodl_fast.compat.gen, doodl_fast.compat.losses; "
        "sys.exit(any(name in sys.modules for name in ('diffusers', 'transformers', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_references_names() -> None:
    from doodl_fast.compat import doodl

    names = "SteppingLayer MixingLayer MakeCutouts spherical_dist_loss clip_loss_fn symmetry_loss_fn fgvc_loss_fn "
    names += "get_generic_cond_fn get_aesthetic_model aesthetic_score aesthetic_loss_fn gen "
    names += "get_alpha_and_beta forward_step reverse_step"
    assert set(names.split()) <= set(doodl.__all__)
    assert all(callable(getattr(doodl, name)) for name in names.split())


def test_gen_takes_what_the_references_takes() -> None:
    expected = {
        "cond_prompt": "a dog",
        "model_guidance_type": "CLIP",
        "model_guidance_dict": {"clip_prompt": "a dog", "clip_viz_paths": None},
        "save_str": "tmp.png",
        "grad_scale": 1,
        "sd_guidance_scale": 7.5,
        "use_cutouts": True,
        "num_cuts": 16,
        "cut_power": 0.3,
        "latent_seed": None,
        "seed": 0,
        "steps": 50,
        "mix_weight": 0.93,
        "null_prompt": "",
        "single_variable": False,
        "latent_traversal": True,
        "num_traversal_steps": 50,
        "save_interval": 1,
        "one_step_baseline": False,
        "tied_latents": True,
        "use_momentum": True,
        "use_nesterov": False,
        "renormalize_latents": True,
        "optimize_first_edict_image_only": False,
        "opt_t": None,
        "perturb_grad_scale": 1e-4,
        "clip_grad_val": 1e-3,
        "source_im": None,
    }
    parameters = inspect.signature(gen).parameters
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert {p.name: p.default for p in positional} == expected
    assert [p.name for p in positional] == list(expected)
