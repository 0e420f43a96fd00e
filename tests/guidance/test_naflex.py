"""SigLIP 2 NaFlex, against the logits of transformers' own model and the patches of its own processor."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipeline
import torch
import torch.nn.functional as F
from conftest import smooth_pictures
from gradients import check_gradient
from PIL import Image
from torch import Tensor, nn

from doodl_fast.guidance import Aesthetic, ClipImage, ClipText, TextScore
from doodl_fast.guidance.naflex import Patches

TEXTS = ["a red star", "a blue circle"]
SIDE, MOST = 4, 16


def processing() -> Any:
    """The module of the model's own image processor that needs no torchvision."""
    return pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tiny model whose logits depend on shapes, and what holds its image processor and a tokenizer."""
    from transformers import Siglip2Config, Siglip2Model

    words = tiny_pipeline.tokenizer(tmp_path_factory.mktemp("naflex"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 16, "projection_size": 16}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(3)
    vision = {**sizes, "num_patches": 16, "patch_size": SIDE}
    model = Siglip2Model(Siglip2Config(text_config={**text, **special}, vision_config=vision)).eval()
    nn.init.constant_(model.logit_scale, 1.0)
    nn.init.constant_(model.logit_bias, -2.0)
    images = processing().Siglip2ImageProcessorPil(patch_size=SIDE, max_num_patches=MOST)
    return model, SimpleNamespace(image_processor=images, tokenizer=words)


def pictures(height: int, width: int, batch: int = 2, seed: int = 0) -> Tensor:
    """On the 256 levels of a saved picture, in [-1, 1]."""
    values = smooth_pictures(batch, height, width, seed).clamp(-0.95, 0.95)
    return ((values / 2 + 0.5) * 255).round() / 255 * 2 - 1


def shown() -> list[Any]:
    """Two pictures of other shapes, neither of which is resized."""
    made = (pictures(12, 20, 1, 4), pictures(28, 8, 1, 5))
    return [Image.fromarray(((p[0] / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()) for p in made]


def inputs(processor: Any, images: Tensor) -> dict[str, Tensor]:
    """Patches, their mask and their numbers of rows and columns, by the processor."""
    arrays = ((images / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return dict(processor.image_processor([Image.fromarray(array) for array in arrays], return_tensors="pt"))


@pytest.mark.parametrize("size", [(12, 20), (16, 16), (4, 64), (28, 8)])
def test_scores_are_the_models_logits(pair: tuple[Any, Any], size: tuple[int, int]) -> None:
    """For pictures that are not resized; the processor adds patches to fill up to 16, and a mask."""
    model, processor = pair
    images = pictures(*size)
    tokens = processor.tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(input_ids=tokens, **inputs(processor, images)).logits_per_image.diagonal()
    got = TextScore(*pair, TEXTS).scores(images)
    assert float((got - expected).abs().max()) <= 1e-5 * math.e
    assert float((got - got.flip(0)).abs().max()) > 1e-3


@pytest.mark.parametrize("size", [(48, 40), (24, 40), (9, 30), (64, 64)])
def test_resized_pictures_are_those_of_the_processor(pair: tuple[Any, Any], size: tuple[int, int]) -> None:
    """PIL rounds after each of its two passes, so pixels may differ by somewhat more than one of 256 levels."""
    images, loss = pictures(*size), TextScore(*pair, TEXTS)
    expected = inputs(pair[1], images)
    resized = loss.view(images / 2 + 0.5)
    got = loss.patches.arguments((resized - 0.5) / 0.5)
    assert torch.equal(got["spatial_shapes"], expected["spatial_shapes"])
    count = got["pixel_values"].shape[1]
    assert count == int(got["spatial_shapes"][0].prod()) <= MOST
    difference = got["pixel_values"] - expected["pixel_values"][:, :count]
    assert float(difference.abs().max() * 127.5) <= 1.6


def test_sizes_are_those_of_the_processor() -> None:
    theirs = processing().get_image_size_for_max_num_patches
    generator = torch.Generator().manual_seed(0)
    for side, most in ((16, 256), (14, 729), (4, 16)):
        for height, width in torch.randint(1, 1200, (60, 2), generator=generator).tolist():
            assert Patches(side, most).sides(height, width) == theirs(height, width, side, most)


@pytest.mark.parametrize("make", [
    lambda model, processor: TextScore(model, processor, TEXTS),
    lambda model, processor: ClipText(model, processor, "a red star"),
    lambda model, processor: ClipImage(model, shown(), processor),
    lambda model, processor: Aesthetic(model, processor, head()),
], ids=["TextScore", "ClipText", "ClipImage", "Aesthetic"])  # fmt: skip
def test_the_gradient_is_that_of_finite_differences(pair: tuple[Any, Any], make: Any) -> None:
    model = copy.deepcopy(pair[0]).double()
    check_gradient(make(model, pair[1]), pictures(30, 22), rel=1e-4)  # positions are resized in float32
    assert all(weight.grad is None for weight in model.parameters())


def head() -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(16, 1)
    nn.init.constant_(layer.bias, 5.0)
    return layer


def test_several_pictures_of_other_shapes(pair: tuple[Any, Any]) -> None:
    """The mean of the embeddings that the model itself computes."""
    model, processor = pair
    made = processor.image_processor(shown(), return_tensors="pt")
    with torch.no_grad():
        embedded = model.get_image_features(**made).pooler_output
    mean = F.normalize(F.normalize(embedded, dim=-1).mean(0, keepdim=True), dim=-1)
    assert torch.allclose(ClipImage(model, shown(), processor).target, mean, atol=1e-5)


def test_cutouts_are_squares(pair: tuple[Any, Any]) -> None:
    loss = ClipText(*pair, "a red star", num_cutouts=3)
    assert loss.size == 16
    torch.manual_seed(0)
    value = loss(pictures(40, 60))
    assert torch.isfinite(value)
    torch.manual_seed(0)
    assert float(loss.leaner()(pictures(40, 60))) == pytest.approx(float(value), rel=1e-5)


def test_a_folder_is_loaded(pair: tuple[Any, Any], tmp_path: Path) -> None:
    for part in (pair[0], pair[1].image_processor, pair[1].tokenizer):
        part.save_pretrained(tmp_path)
    from transformers import AutoProcessor

    images, words = pictures(30, 22), AutoProcessor.from_pretrained(tmp_path)  # it makes other tokens
    loaded = TextScore.from_pretrained(tmp_path, TEXTS)
    assert loaded.patches == Patches(SIDE, MOST)
    assert torch.allclose(loaded.scores(images), TextScore(pair[0], words, TEXTS).scores(images), rtol=1e-5)


def test_a_model_without_any_size_is_refused(pair: tuple[Any, Any]) -> None:
    config = SimpleNamespace(vision_config=SimpleNamespace())
    model = SimpleNamespace(get_image_features=print, get_text_features=print, config=config)
    with pytest.raises(ValueError, match="model: expected one whose vision_config has image_size or"):
        TextScore(model, pair[1], "a")
