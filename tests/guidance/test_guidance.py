"""Losses on pixels, against the recordings and against the models asked directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
import torch
import torch.nn.functional as F
from conftest import DEVICE, golden, golden_meta, randn, relative, smooth_pictures
from PIL import Image
from tolerances import FP32
from torch import Tensor

from doodl_fast.diffusion.images import open_picture
from doodl_fast.guidance import Classifier, ClipImage, ClipText, Symmetry, random_cutouts, spherical_distance
from doodl_fast.guidance.clip import CLIP_MEAN, CLIP_STD
from doodl_fast.guidance.cutouts import resize_and_crop

CUTOUTS = [("cut16_power1.0_seed0", 16, 1.0, 0), ("cut16_power0.3_seed7", 16, 0.3, 7)]
CUTOUTS += [("cut16_power0.06_seed7", 16, 0.06, 7), ("cut64_power0.3_seed0", 64, 0.3, 0)]


def pictures(batch: int = 2, height: int = 48, width: int = 40, seed: int = 0) -> Tensor:
    """In [-1, 1], neither noise nor constant."""
    return smooth_pictures(batch, height, width, seed).clamp(-0.95, 0.95)


def gradient(loss: Any, images: Tensor) -> Tensor:
    leaf = images.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


# the distance


@pytest.mark.parametrize("case", ["one_vs_one", "one_row_vs_one", "same"])
def test_spherical_distance_matches_the_recording(case: str) -> None:
    record = golden("clip")
    x, y = record["sphere/x"][0], record["sphere/y"]
    if case == "one_row_vs_one":
        x = x[None]
    y = x.clone() if case == "same" else y
    x = x.clone().requires_grad_()
    value = spherical_distance(x, y)
    assert torch.allclose(value.reshape(1), record[f"sphere/{case}/value"], rtol=1e-6, atol=0)
    value.sum().backward()
    expected = record[f"sphere/{case}/grad_x"]
    assert x.grad is not None
    assert (x.grad - expected).norm() <= 2e-6 * max(float(expected.norm()), 1e-6)


def test_the_recorded_minimum_is_one_of_the_rows() -> None:
    record = golden("clip")
    x = record["sphere/x"].clone().requires_grad_()
    rows = spherical_distance(x, record["sphere/y"])
    assert rows.shape == (5,)
    assert float(rows.detach().min()) == pytest.approx(float(record["sphere/rows_vs_one/value"]), rel=1e-6)
    rows.min().backward()
    assert relative(x.grad, record["sphere/rows_vs_one/grad_x"]) < 2e-6


def test_spherical_distance_is_finite_where_the_reference_is_not() -> None:
    record = golden("clip")
    x = record["sphere/x"][0].clone().requires_grad_()
    value = spherical_distance(x, -x.detach() * 2)
    assert float(value.detach()) == pytest.approx(float(record["sphere/opposite/value"]), rel=1e-6)
    value.backward()
    assert not torch.isfinite(record["sphere/opposite/grad_x"]).all()
    assert torch.isfinite(x.grad).all()
    for y in (x.detach(), x.detach() * 3, torch.zeros_like(x)):
        assert torch.isfinite(gradient(lambda z, y=y: spherical_distance(z, y), x)).all()


def test_spherical_distance_keeps_its_gradient_near_its_ends() -> None:
    """Half the squared angle: a turn by 1e-3 at the angle 1e-3 from a pole must show."""
    for angle in (1e-3, 1.0, np.pi - 1e-3):
        a = torch.tensor(angle, dtype=torch.float64, requires_grad=True)
        x = torch.stack([a.cos(), a.sin()])
        value = spherical_distance(x, torch.tensor([1.0, 0.0], dtype=torch.float64))
        value.backward()
        assert float(value.detach()) == pytest.approx(angle**2 / 2, rel=1e-9)
        assert float(a.grad) == pytest.approx(angle, rel=1e-6)


# cutouts and sizes


@pytest.mark.parametrize(("case", "size", "power", "seed"), CUTOUTS)
def test_cutouts_match_the_recording(case: str, size: int, power: float, seed: int) -> None:
    record = golden("clip")
    meta = golden_meta("clip")[f"cutouts/{case}"]
    torch.manual_seed(seed)
    image = record["cutouts/image"].clone().requires_grad_()
    out = random_cutouts(image, 4, size, power)
    assert float(torch.rand(())) == meta["next_torch_rand"]
    expected = record[f"cutouts/{case}/out"]  # on a CPU
    assert torch.equal(out, expected) if DEVICE.type == "cpu" else relative(out, expected) < 1e-6
    w = randn(*out.shape, seed=44).to(out)
    (out * w).sum().backward()
    assert relative(image.grad, record[f"cutouts/{case}/grad_image"]) < 1e-6


def test_cutouts_of_a_batch_are_the_same_squares() -> None:
    images = pictures(3)
    torch.manual_seed(0)
    together = random_cutouts(images, 2, 16, 0.5)
    torch.manual_seed(0)
    second = random_cutouts(images[1:2], 2, 16, 0.5)
    assert together.shape == (6, 3, 16, 16)
    assert torch.equal(together[1::3], second)


@pytest.mark.parametrize(("num", "size", "power", "named"), [(0, 8, 1, "num"), (1, 0, 1, "size"), (1, 8, 0, "power")])
def test_cutouts_that_cannot_be(num: int, size: int, power: float, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}: expected"):
        random_cutouts(pictures(), num, size, power)


@pytest.mark.parametrize(("height", "width"), [(96, 64), (50, 70), (20, 24), (32, 32)])
def test_resizing_is_that_of_pil(height: int, width: int) -> None:
    image = (pictures(1, height, width) + 1) / 2
    out = resize_and_crop(image, 32)
    scale = 32 / min(height, width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = (rows - 32) // 2, (columns - 32) // 2
    for channel in range(3):
        resized = np.asarray(
            Image.fromarray(image[0, channel].numpy()).resize((columns, rows), Image.Resampling.BICUBIC)
        )
        expected = torch.from_numpy(resized[top : top + 32, left : left + 32].copy())
        assert (out[0, channel] - expected).abs().max() < 2e-3


# symmetry


def test_symmetry_matches_the_recording() -> None:
    record = golden("clip")
    meta = golden_meta("clip")["loss/symmetry"]
    pixels, scale = record["loss/pixels"], 3.0
    assert scale * float(Symmetry()(pixels)) == pytest.approx(meta["value"], rel=1e-6)
    probe = scale * gradient(Symmetry(), pixels).flatten()[::7]
    assert relative(probe, record["loss/symmetry/grad_pixels_probe"]) < 1e-6


def test_symmetry_knows_its_axes() -> None:
    half = pictures(1, 16, 8)
    mirrored = torch.cat([half, half.flip(-1)], -1)
    assert float(Symmetry("horizontal")(mirrored)) == 0 < float(Symmetry("vertical")(mirrored))
    assert float(Symmetry("vertical")(mirrored.transpose(-1, -2))) == 0
    assert Symmetry()(mirrored.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="direction: expected one of 'horizontal', 'vertical', got 'diagonal'"):
        Symmetry("diagonal")


# CLIP


def test_clip_text_is_the_angle_between_the_models_own_embeddings(clip: tuple[Any, Any]) -> None:
    model, processor = clip
    images = pictures(3, 32, 32)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    tokens = processor.tokenizer(["a dog"], return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=((images + 1) / 2 - mean) / std, input_ids=tokens.input_ids)
    angles = torch.acos((out.image_embeds @ out.text_embeds.T).double()).squeeze(1)
    loss = ClipText(model, processor, "a dog")
    assert float(loss(images)) == pytest.approx(float((angles**2 / 2).mean()), rel=1e-5)
    assert loss(images).shape == ()
    by_tokenizer = ClipText(model, processor.tokenizer, "a dog")
    assert torch.equal(by_tokenizer.target, loss.target)
    assert not torch.equal(ClipText(model, processor, "a cat").target, loss.target)


def test_clip_descends_and_leaves_the_model_alone(clip: tuple[Any, Any]) -> None:
    model, processor = clip
    model.train()
    loss, images = ClipText(model, processor, "a dog"), pictures()
    grad = gradient(loss, images)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()
    small = 1e-2 * grad / grad.abs().max()
    drop, predicted = float(loss(images) - loss(images - small)), float((grad * small).sum())
    assert drop == pytest.approx(predicted, rel=0.05) and drop > 0


def test_clip_cutouts_come_from_the_global_generator(clip: tuple[Any, Any]) -> None:
    loss = ClipText(*clip, "a dog", num_cutouts=3, cut_power=0.5)
    torch.manual_seed(3)
    first, second = float(loss(pictures())), float(loss(pictures()))
    torch.manual_seed(3)
    assert float(loss(pictures())) == first != second
    torch.manual_seed(3)
    squares = random_cutouts((pictures() + 1) / 2, 3, 32, 0.5) * 2 - 1
    assert float(ClipText(*clip, "a dog")(squares)) == pytest.approx(first, rel=1e-5)


def test_clip_image_is_zero_for_its_own_picture(clip: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = clip
    images = (pictures(2, 32, 32) * 127.5).round() / 127.5
    loss = ClipImage(model, images[:1], processor)
    assert float(loss(images[:1])) < 1e-10 < float(loss(images[1:]))
    assert torch.isfinite(gradient(loss, images[:1])).all()
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    from_files = ClipImage(model, [tmp_path / "a.png", Image.fromarray(pixels[1])], processor)
    from_tensor = ClipImage(model, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, processor)
    assert relative(from_files.target, from_tensor.target) < FP32
    assert float(from_files.target.norm()) == pytest.approx(1)


def test_a_half_guide_gives_nearly_the_same_gradient(clip: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = clip
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    half = ClipText.from_pretrained(tmp_path / "clip", "a dog", dtype=torch.float16)
    assert half.model.dtype == torch.float16
    images = pictures(1, 256, 256)
    value = half(images)
    assert value.dtype == torch.float32
    full = ClipText(model, processor, "a dog")
    assert relative(gradient(half, images), gradient(full, images)) < 2e-2
    tiny = gradient(lambda x: 2.0**-30 * half(x), images)
    assert relative(2.0**30 * tiny, gradient(half, images)) < 1e-6


def test_clip_errors(clip: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = clip
    with pytest.raises(ValueError, match="prompt: expected a text to guide to, got ' '"):
        ClipText(model, processor, " ")
    with pytest.raises(TypeError, match="processor: expected a CLIPProcessor or a tokenizer"):
        ClipText(model, processor.image_processor, "a dog")
    with pytest.raises(TypeError, match="model: expected a transformers CLIPModel, got Linear"):
        ClipText(torch.nn.Linear(1, 1), processor, "a dog")
    with pytest.raises(ValueError, match="num_cutouts: expected an int of at least 0, got -1"):
        ClipText(model, processor, "a dog", num_cutouts=-1)
    with pytest.raises(ValueError, match="images: expected at least one picture, got none"):
        ClipImage(model, [], processor)
    with pytest.raises(ValueError, match=r"guidance model: the folder .* does not exist"):
        ClipText.from_pretrained(tmp_path / "none", "a dog")
    with pytest.raises(ValueError, match=r"images: the file .*none.png' does not exist"):
        open_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"images: the file .*text.png' is no picture"):
        open_picture(tmp_path / "text.png")
    for images, error in ((torch.zeros(3, 8, 8), ValueError), (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError)):
        with pytest.raises(error, match="images: expected"):
            ClipText(model, processor, "a dog")(images)


def test_transparent_and_grey_pictures() -> None:
    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    assert torch.equal(open_picture(clear), torch.ones(1, 3, 2, 4))
    assert torch.allclose(open_picture(Image.new("L", (4, 2), 0)), -torch.ones(1, 3, 2, 4))


# classifiers


def test_classifier_is_the_cross_entropy_of_the_models_logits() -> None:
    model = tiny_pipeline.classifier()
    images = pictures(3, 32, 32)
    with torch.no_grad():
        expected = F.cross_entropy(model(images).logits, torch.full((3,), 1))
    loss = Classifier(model, None, "blue circle")
    assert float(loss(images)) == pytest.approx(float(expected), rel=1e-5)
    grad = gradient(loss, images)
    assert float(loss(images - grad / grad.norm() * 1e-2)) < float(loss(images))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    plain = Classifier(lambda x: model(x).logits, None, 1)
    assert torch.equal(plain(images), loss(images))


def test_classifier_uses_the_processors_numbers_unless_told_otherwise() -> None:
    from transformers import ConvNextImageProcessor

    seen: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(x)
        return x.mean((2, 3))

    processor = ConvNextImageProcessor(size={"shortest_edge": 24}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1, 2])
    images = pictures(1, 48, 40)
    Classifier(spy, processor, 0)(images)
    assert seen[-1].shape == (1, 3, 24, 24)
    Classifier(spy, processor, 0, mean=(0, 0, 0), std=(1, 1, 1), size=20)(images)
    assert seen[-1].shape == (1, 3, 20, 20)
    restored = seen[-2] * torch.tensor([0.5, 1, 2]).reshape(1, 3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).reshape(
        1, 3, 1, 1
    )
    assert 0 < float(restored.min()) < float(restored.max()) < 1
    Classifier(spy, None, 0)(images)
    assert torch.allclose(seen[-1], images, atol=1e-6)


@pytest.mark.parametrize(
    ("label", "index"),
    [
        (0, 0),
        ("3", 3),
        ("red star", 0),
        ("Blue Circle", 1),
        ("tench", 2),
        ("Tinca tinca", 2),
        ("tench, Tinca tinca", 2),
    ],
)
def test_labels(label: int | str, index: int) -> None:
    assert Classifier(tiny_pipeline.classifier(), None, label).label == index


def test_label_errors() -> None:
    model = tiny_pipeline.classifier()
    with pytest.raises(
        ValueError, match="label: 'read star' is not one of the model's 4 classes; the closest are 'red st"
    ):
        Classifier(model, None, "read star")
    with pytest.raises(ValueError, match="label: 'xyzzy' is not one of the model's 4 classes"):
        Classifier(model, None, "xyzzy")
    for index in (4, -1, "4"):
        with pytest.raises(ValueError, match="label: expected an index from 0 to 3, got"):
            Classifier(model, None, index)
    for label in (True, 1.0, None):
        with pytest.raises(TypeError, match="label: expected a class's index or name"):
            Classifier(model, None, label)
    with pytest.raises(ValueError, match=r"label: expected an index below 3 .the classes., got 7"):
        Classifier(lambda x: x.mean((2, 3)), None, 7)(pictures())


def test_a_classifier_from_a_folder_without_a_processor(tmp_path: Path) -> None:
    model = tiny_pipeline.classifier()
    model.save_pretrained(tmp_path)
    loss = Classifier.from_pretrained(tmp_path, "red star")
    assert float(loss(pictures())) == pytest.approx(float(Classifier(model, None, 0)(pictures())), rel=1e-6)
    with pytest.raises(ValueError, match=r"guidance model: expected a folder with config.json"):
        Classifier.from_pretrained(tmp_path.parent, "red star")
