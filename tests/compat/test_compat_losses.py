"""The reference's losses under its own names, against the recordings (tests/golden/README.md, stage clip)."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
import torch
import torch.nn.functional as F
from conftest import DEVICE, golden, golden_meta, relative, smooth_pictures
from PIL import Image
from recorded_guide import TinyGuide, antialiased, head, recorded_picture_target, tiny_guide
from tolerances import FP32
from torch import Tensor, nn

from doodl_fast.compat import Quirks, losses
from doodl_fast.guidance.clip import CLIP_MEAN, CLIP_STD

NAMES = ("vit_b_32", "vit_l_14", "vit_g_14")
HEADS = ("vit_l_14", "vit_b_32")


def meta(case: str) -> dict[str, Any]:
    return golden_meta("clip")[case]


def guides() -> dict[str, Any]:
    return {name: tiny_guide() for name in NAMES}


def pictures(height: int = 48, width: int = 64) -> Tensor:
    return smooth_pictures(1, height, width).to(DEVICE)


def check(loss_fn: losses.LossFn, case: str) -> None:
    """Compares a loss with the recorded value, and its gradient with the recorded one."""
    torch.manual_seed(3)
    pixels = golden("clip")["loss/pixels"].clone().requires_grad_()
    value = loss_fn(pixels)
    assert value.shape == ()
    assert float(value.detach()) == pytest.approx(meta(f"loss/{case}")["value"], rel=2e-6)
    (gradient,) = torch.autograd.grad(value, pixels)
    assert relative(gradient.flatten()[::7], golden("clip")[f"loss/{case}/grad_pixels_probe"]) < FP32
    assert float(gradient.norm()) == pytest.approx(meta(f"loss/{case}")["grad_norm"], rel=2e-6)


# Distance and cutouts


@pytest.mark.parametrize("case", ["rows_vs_one", "one_row_vs_one", "one_vs_one", "rows_vs_rows", "same", "opposite"])
def test_spherical_dist_loss(case: str) -> None:
    record, recorded = golden("clip"), meta(f"sphere/{case}")
    x, y = record["sphere/x"], record["sphere/y"]
    x, y = {
        "rows_vs_one": (x, y),
        "one_row_vs_one": (x[:1], y),
        "one_vs_one": (x[0], y),
        "rows_vs_rows": (x, x),
        "same": (x[0], x[0]),
        "opposite": (y, -y),
    }[case]
    leaf = x.clone().requires_grad_()
    value = losses.spherical_dist_loss(leaf, y.clone())
    assert list(value.shape) == recorded["shape"]
    assert torch.allclose(value.reshape(1), record[f"sphere/{case}/value"], rtol=1e-6, atol=0)
    value.sum().backward()
    expected = record[f"sphere/{case}/grad_x"]
    assert bool(torch.isfinite(leaf.grad).all()) == recorded["grad_finite"]
    if recorded["grad_finite"]:
        assert (leaf.grad - expected).norm() <= 2e-6 * max(float(expected.norm()), 1e-6)


def test_the_distances_quirks() -> None:
    x, y = golden("clip")["sphere/x"], golden("clip")["sphere/y"]
    rows = torch.stack([losses.spherical_dist_loss(row, y) for row in x])
    assert float(losses.spherical_dist_loss(x, y)) == pytest.approx(float(rows.min()), rel=1e-6)
    mean = losses.spherical_dist_loss(x, y, Quirks(minimum_over_cutouts=False))
    assert float(mean) == pytest.approx(float(rows.mean()), rel=1e-6)
    leaf = y.clone().requires_grad_()
    finite = losses.spherical_dist_loss(leaf, -y, Quirks(infinite_gradient_of_opposites=False))
    assert torch.isfinite(torch.autograd.grad(finite, leaf)[0]).all()


def test_make_cutouts() -> None:
    case = "cut16_power0.3_seed7"
    torch.manual_seed(7)
    out = losses.MakeCutouts(16, 0.3)(golden("clip")["cutouts/image"], 4)
    expected = golden("clip")[f"cutouts/{case}/out"]  # recorded on a CPU
    assert torch.equal(out, expected) if DEVICE.type == "cpu" else relative(out, expected) < 1e-6
    assert float(torch.rand(())) == meta(f"cutouts/{case}")["next_torch_rand"]
    assert losses.MakeCutouts(cut_size=8).cut_power == 1.0


# CLIP


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("clip_text", {"grad_scale": 2.0}),
        ("clip_text/no_antialias", {"grad_scale": 2.0}),
        ("clip_text_cutouts", {"grad_scale": 2.0, "use_cutouts": True, "num_cuts": 4}),
        ("clip_all_models", {"grad_scale": 0.6, "clip_model_str": "all", "weights": [1]}),
        ("clip_l14", {"grad_scale": 1.0, "clip_model_str": "vit_l_14"}),
        ("clip_l14/no_antialias", {"grad_scale": 1.0, "clip_model_str": "vit_l_14"}),
    ],
)
def test_clip_text(case: str, options: dict[str, Any]) -> None:
    given = guides()
    check(losses.clip_loss_fn("a cat", clip_models=given, quirks=antialiased(case), **options), case)
    used = [name for name, (model, _) in given.items() if model.texts]
    recorded = meta(f"loss/{case}")["models_loaded"]
    assert [losses.CLIP_MODELS[name] for name in used] == recorded


class Pretending(TinyGuide):
    """A guide that has a given embedding for the guiding pictures, which are embedded without gradient."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return super().get_image_features(pixel_values) if torch.is_grad_enabled() else self.target[None]


@pytest.mark.parametrize("case", ["clip_viz", "clip_viz/no_antialias", "clip_viz_cutouts"])
def test_clip_pictures(case: str) -> None:
    """The direction of the guiding pictures is computed from `clip_viz`. With cutouts it gives what was recorded."""
    source = "clip_viz/no_antialias" if "no_antialias" in case else "clip_viz"
    target = recorded_picture_target("no_antialias" not in case, meta(f"loss/{source}")["value"])
    cutouts = {"use_cutouts": True, "num_cuts": 4} if "cutouts" in case else {}
    loss_fn = losses.clip_loss_fn(
        clip_viz_paths=[Image.new("RGB", (8, 8))],
        grad_scale=1.0,
        clip_models={"vit_b_32": (Pretending(target), None)},
        quirks=antialiased(case),
        **cutouts,
    )
    check(loss_fn, case)


def test_the_direction_of_several_pictures(tmp_path: Path) -> None:
    model, _ = tiny_guide()
    values = np.random.default_rng(0).integers(0, 256, (2, 230, 300, 3)).astype(np.uint8)
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for path, value in zip(paths, values, strict=False):
        Image.fromarray(value).save(path)
    Image.fromarray(values[0, :, :, 0]).save(paths[2])
    squares = F.interpolate(torch.from_numpy(values).to(DEVICE).permute(0, 3, 1, 2) / 255, (224, 292), mode="bilinear")[
        ..., 34:258
    ]
    mean, std = (torch.tensor(v, device=DEVICE).reshape(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        directions = F.normalize(model.get_image_features((squares - mean) / std), dim=-1)
        target = F.normalize(directions.mean(0), dim=-1)
        seen = F.interpolate((pictures() / 2 + 0.5).clamp(0, 1), (224, 298), mode="bilinear")
        expected = losses.spherical_dist_loss(model.get_image_features((seen - mean) / std)[0], target)
    options = {"clip_viz_paths": paths, "grad_scale": 1.0, "clip_models": {"vit_b_32": (model, None)}}
    with pytest.warns(UserWarning, match=r"clip_viz_paths: .*2.png is greyscale, and left out"):
        loss_fn = losses.clip_loss_fn(**options)
    assert float(loss_fn(pictures())) == pytest.approx(float(expected), rel=1e-5)
    with_grey = losses.clip_loss_fn(**options, quirks=Quirks(skipped_grey_guides=False))
    assert float(with_grey(pictures())) != pytest.approx(float(expected), rel=1e-4)
    with (
        pytest.warns(UserWarning, match="greyscale"),
        pytest.raises(ValueError, match="clip_viz_paths: expected at least one picture in colour, got none"),
    ):
        losses.clip_loss_fn(**{**options, "clip_viz_paths": paths[2:]})


def test_several_clip_models_and_their_weights() -> None:
    given = guides()
    with torch.no_grad():
        given["vit_l_14"][0].fc.weight += 0.1
        given["vit_g_14"][0].fc.bias -= 0.2
    options = {"grad_scale": 1.0, "clip_models": given}
    alone = [float(losses.clip_loss_fn("a", clip_model_str=name, **options)(pictures())) for name in NAMES]
    assert len(set(alone)) == 3
    together = {**options, "clip_model_str": "all", "quirks": Quirks(one_clip_model=False)}
    assert float(losses.clip_loss_fn("a", **together)(pictures())) == pytest.approx(sum(alone) / 3, rel=1e-6)
    weighted = losses.clip_loss_fn("a", weights=[1, 2, 5], **together)
    expected = (alone[0] + 2 * alone[1] + 5 * alone[2]) / 8
    assert float(weighted(pictures())) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"weights: expected one for each of vit_b_32, vit_l_14, vit_g_14, got \(1, 2\)"
    ):
        losses.clip_loss_fn("a", weights=[1, 2], **together)


def test_clip_from_a_folder(tmp_path: Path) -> None:
    model, processor = tiny_pipeline.clip(tmp_path / "words")
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    folder = str(tmp_path / "clip")
    by_name = losses.clip_loss_fn("a dog", grad_scale=1, clip_model_str=folder, dtype=torch.float32)
    given = losses.clip_loss_fn("a dog", grad_scale=1, clip_models={"vit_b_32": folder}, dtype=torch.float32)
    images = pictures(32, 32)
    assert torch.equal(by_name(images), given(images))
    in_half = losses.clip_loss_fn("a dog", grad_scale=1, clip_model_str=folder, dtype=torch.float16)
    assert float(in_half(images)) == pytest.approx(float(given(images)), rel=1e-2)


def test_clip_errors() -> None:
    with pytest.raises(
        ValueError, match=r"clip_model_str: expected one of vit_b_32, .*'all', a folder or a hub id, got 'o"
    ):
        losses.clip_loss_fn("a", clip_model_str="other")
    for texts in ((None, None), ("a", ["b.png"])):
        with pytest.raises(ValueError, match="prompt, clip_viz_paths: expected one of them"):
            losses.clip_loss_fn(*texts)


# Aesthetic scores


@pytest.mark.parametrize("resizing", ["", "/no_antialias"])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("aesthetic_max", {"grad_scale": 1.0}),
        (
            "aesthetic_both_target",
            {"grad_scale": 1.0, "aesthetic_target": 10, "clip_model_str": "both", "weights": [0.5, 1.5]},
        ),
    ],
)
def test_aesthetics(case: str, options: dict[str, Any], resizing: str) -> None:
    case += f"/autocast_norm{resizing}"
    heads = {name: head(name) for name in HEADS}
    check(losses.aesthetic_loss_fn(heads=heads, clip_models=guides(), quirks=antialiased(case), **options), case)


def test_the_aesthetic_quirks() -> None:
    options = {"grad_scale": 1.0, "clip_models": guides(), "heads": {name: head(name) for name in HEADS}}
    large, base = (-float(losses.aesthetic_loss_fn(**options, clip_model_str=name)(pictures())) for name in HEADS)

    def score(**quirks: bool) -> float:
        both = {**options, "clip_model_str": "both", "weights": [1, 3], "quirks": Quirks(**quirks)}
        return -float(losses.aesthetic_loss_fn(**both)(pictures()))

    assert score() == pytest.approx((large + 3 * base) / 2, rel=1e-6)
    assert score(aesthetic_average_by_count=False) == pytest.approx((large + 3 * base) / 4, rel=1e-6)
    assert score(aesthetic_weights_large_first=False) == pytest.approx((base + 3 * large) / 2, rel=1e-6)


def test_aesthetic_heads_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(
        ValueError, match=r"heads: no aesthetic head for 'vit_l_14' was given, and there is none at .*pth"
    ):
        losses.get_aesthetic_model()
    with pytest.raises(ValueError, match="clip_model: expected one of vit_l_14, vit_b_32, got 'vit_h'"):
        losses.get_aesthetic_model("vit_h")
    (tmp_path / ".cache" / "emb_reader").mkdir(parents=True)
    path = tmp_path / ".cache" / "emb_reader" / "sa_0_4_vit_l_14_linear.pth"
    torch.save(head("vit_l_14").state_dict(), path)
    by_name = losses.aesthetic_loss_fn(grad_scale=1, clip_models=guides())
    by_path = losses.aesthetic_loss_fn(grad_scale=1, clip_models=guides(), heads=path)
    by_layer = losses.aesthetic_loss_fn(grad_scale=1, clip_models=guides(), heads=head("vit_l_14"))
    assert float(by_name(pictures())) == float(by_path(pictures())) == float(by_layer(pictures()))
    with pytest.raises(ValueError, match="heads: expected a dict with vit_l_14 and vit_b_32, got PosixPath"):
        losses.aesthetic_loss_fn(clip_model_str="both", heads=path)
    with pytest.raises(ValueError, match=r"weights: expected one for each of vit_l_14, vit_b_32, got \[?\(?1"):
        losses.aesthetic_loss_fn(clip_model_str="both", weights=[1])


def test_aesthetic_score() -> None:
    model, _ = tiny_guide()
    images = pictures(224, 224)
    features = F.normalize(model.get_image_features(images), dim=-1)
    expected = head("vit_b_32")(features).clip(1, 10).mean().detach()

    class OpenClip(nn.Module):
        def encode_image(self, image: Tensor) -> Tensor:
            return model.get_image_features(image)

    for clip in (model, OpenClip()):
        assert float(losses.aesthetic_score(images, clip, head("vit_b_32")).detach()) == pytest.approx(
            float(expected), rel=1e-6
        )


# Classes and symmetry


@pytest.mark.parametrize("form", ["logits", "tuple", "object"])
def test_any_classifier_in_place_of_the_fine_grained_one(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 3, generator=generator).to(DEVICE)

    class Network(nn.Module):
        def forward(self, x: Tensor) -> Any:
            self.shape = tuple(x.shape)
            logits = x.mean((2, 3)) @ matrix.T
            return {"logits": logits, "tuple": (x, x, logits), "object": type("Out", (), {"logits": logits})}[form]

    network = Network()
    loss_fn = losses.fgvc_loss_fn("bird", 5, grad_scale=2.0, model=network)
    images = pictures()
    statistics = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=DEVICE)
    mean, std = statistics.reshape(2, 1, 3, 1, 1)
    seen = F.interpolate(images / 2 + 0.5, (512, 682), mode="bilinear")[..., 85:597]
    expected = 2 * F.cross_entropy(((seen - mean) / std).mean((2, 3)) @ matrix.T, torch.tensor([5], device=DEVICE))
    assert float(loss_fn(images)) == pytest.approx(float(expected), rel=1e-5)
    assert network.shape == (1, 3, 512, 512)
    torch.manual_seed(0)
    with_cutouts = losses.fgvc_loss_fn("bird", 5, True, 3, grad_scale=2.0, model=network)
    with_cutouts(images)
    assert network.shape == (3, 3, 512, 512)


def test_a_classifier_from_a_folder(tmp_path: Path) -> None:
    model = tiny_pipeline.classifier()
    model.save_pretrained(tmp_path)
    images = pictures(512, 512)
    by_folder = losses.fgvc_loss_fn(None, "red star", grad_scale=1.0, model=tmp_path, dtype=torch.float32)
    by_pair = losses.fgvc_loss_fn(None, 0, grad_scale=1.0, model=(model.to(DEVICE), None))
    assert float(by_folder(images)) == pytest.approx(float(by_pair(images)), rel=1e-6)
    with pytest.raises(ValueError, match=r"model: expected a classifier for dataset='dog', got none"):
        losses.fgvc_loss_fn("dog")


def test_symmetry() -> None:
    check(losses.symmetry_loss_fn("horizontal", grad_scale=3.0), "symmetry")
    half = pictures(16, 8)
    upright = torch.cat([half, half.flip(-2)], -2)
    assert float(losses.symmetry_loss_fn("vertical", 1.0)(upright)) == 0
    with pytest.raises(ValueError, match="direction: expected one of 'horizontal', 'vertical', got 'other'"):
        losses.symmetry_loss_fn("other")


def test_the_factories_take_what_the_references_take() -> None:
    """They take the same arguments by position and by name, with the same defaults; lists have become tuples."""
    cutouts = {"use_cutouts": False, "num_cuts": 64, "cut_power": 0.6, "grad_scale": 0}
    expected = {
        losses.clip_loss_fn: {"prompt": None, "clip_viz_paths": None}
        | cutouts
        | {"clip_model_str": "vit_b_32", "weights": (1,)},
        losses.fgvc_loss_fn: {"dataset": None, "class_idx": 0} | cutouts,
        losses.aesthetic_loss_fn: {"aesthetic_target": None}
        | cutouts
        | {"clip_model_str": "vit_l_14", "weights": (1, 1)},
        losses.get_aesthetic_model: {"clip_model": "vit_l_14"},
    }
    for function, parameters in expected.items():
        got = inspect.signature(function).parameters
        assert {name: got[name].default for name in list(got)[: len(parameters)]} == parameters
        assert list(got)[: len(parameters)] == list(parameters)


def test_guides_get_no_gradients() -> None:
    given = guides()
    loss_fn = losses.clip_loss_fn("a", grad_scale=1.0, clip_models=given, quirks=replace(Quirks(), one_clip_model=True))
    loss_fn(pictures().requires_grad_()).backward()
    weights = [parameter for model, _ in given.values() for parameter in model.parameters()]
    assert all(weight.grad is None and weight.requires_grad for weight in weights)
