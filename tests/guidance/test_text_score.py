"""Scores of pictures for texts, against the logits of transformers' own models and processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from conftest import smooth_pictures
from PIL import Image
from torch import Tensor

from doodl_fast.guidance import PickScore, TextScore

TEXTS = ["a red star", "a blue circle"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tiny SigLIP, and a processor that resizes to the square."""
    from transformers import CLIPImageProcessor, CLIPProcessor, SiglipConfig, SiglipModel

    words = tiny_pipeline.tokenizer(tmp_path_factory.mktemp("siglip"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 16, "projection_size": 16}
    torch.manual_seed(3)
    config = SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    model = SiglipModel(config).eval()
    torch.nn.init.constant_(model.logit_scale, 1.0)
    torch.nn.init.constant_(model.logit_bias, -2.0)
    pictures = CLIPImageProcessor(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return model, CLIPProcessor(pictures, words)


@pytest.fixture(params=["clip", "siglip"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    found: tuple[Any, Any] = request.getfixturevalue(request.param)
    return found


def pictures(height: int = 48, width: int = 40) -> Tensor:
    """On the 256 levels of a saved picture, in [-1, 1]."""
    values = smooth_pictures(2, height, width, 0).clamp(-0.95, 0.95)
    return ((values / 2 + 0.5) * 255).round() / 255 * 2 - 1


def own_pixels(processor: Any, images: Tensor) -> Tensor:
    """What the model's processor, which resizes by PIL, makes of pictures."""
    arrays = ((images / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    made = processor.image_processor([Image.fromarray(array) for array in arrays], return_tensors="pt")
    return made.pixel_values


def own_scores(model: Any, processor: Any, images: Tensor, texts: list[str]) -> Tensor:
    """The logits of the model itself."""
    pixels = own_pixels(processor, images)
    length = min(processor.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    tokens = processor.tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return model(input_ids=tokens, pixel_values=pixels).logits_per_image.diagonal()


def test_scores_are_the_models_logits(pair: tuple[Any, Any]) -> None:
    """For pictures of the model's size, which are not resized."""
    images = pictures(32, 32)
    scale = float(pair[0].logit_scale.detach().exp())
    got = TextScore(*pair, TEXTS).scores(images)
    assert float((got - own_scores(*pair, images, TEXTS)).abs().max()) <= 1e-5 * scale
    assert float((got - got.flip(0)).abs().max()) > 1e-2 * scale  # texts and pictures matter


@pytest.mark.parametrize("size", [(48, 40), (64, 64), (20, 24)])
def test_resized_pictures_are_those_of_the_processor(
    pair: tuple[Any, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL rounds after each of its two passes, so pixels may differ by somewhat more than one of 256 levels."""
    images, loss, seen = pictures(*size), TextScore(*pair, TEXTS), []
    monkeypatch.setattr(loss, "_features", lambda x: seen.append(x) or torch.ones(2, 16))
    loss.scores(images)
    expected = own_pixels(pair[1], images)
    std = torch.tensor(loss.std).reshape(1, 3, 1, 1)
    assert expected.shape == seen[0].shape
    assert float(((seen[0] - expected) * std * 255).abs().max()) <= 1.6


def test_the_loss_is_minus_the_mean_score(pair: tuple[Any, Any]) -> None:
    images = pictures()
    one = PickScore(*pair, TEXTS[0])
    assert float(one(images)) == pytest.approx(-float(one.scores(images).mean()), rel=1e-6)
    both = TextScore(*pair, [TEXTS[0]] * 2).scores(images)
    assert torch.allclose(one.scores(images), both, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences(pair: tuple[Any, Any]) -> None:
    import copy

    model = copy.deepcopy(pair[0]).double()
    loss = TextScore(model, pair[1], TEXTS)
    images = pictures().double().requires_grad_()
    (grad,) = torch.autograd.grad(loss(images), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction, step = direction / direction.norm(), 1e-5
    with torch.no_grad():
        slope = float(loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
    assert float(grad.norm()) > 1e-4
    assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_folder_is_loaded(clip: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = clip
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    loss = PickScore.from_pretrained(tmp_path / "model", TEXTS, processor=tmp_path / "processor")
    assert isinstance(loss, PickScore)
    assert torch.equal(loss.scores(pictures()), TextScore(model, processor, TEXTS).scores(pictures()))


def test_bad_input_is_refused(clip: tuple[Any, Any]) -> None:
    model, processor = clip
    with pytest.raises(ValueError, match="prompt: expected 1 text or 2, one for each picture, got 3"):
        TextScore(model, processor, ["a", "b", "c"])(pictures())
    with pytest.raises(ValueError, match="prompt: expected a text, or a text for each picture, got"):
        TextScore(model, processor, ["a", " "])
    with pytest.raises(TypeError, match="processor: expected one with a tokenizer"):
        TextScore(model, processor.image_processor, "a")
    with pytest.raises(ValueError, match="images: expected shape"):
        TextScore(model, processor, "a")(torch.zeros(1, 4, 8, 8))
