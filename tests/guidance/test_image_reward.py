"""ImageReward against what its authors' package computed with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bert_words import bert_words
from conftest import golden, relative, smooth_pictures
from gradients import check_gradient
from safetensors.torch import save_file
from torch import Tensor

from doodl_fast.guidance import ImageReward
from doodl_fast.guidance.cutouts import resize_and_crop
from doodl_fast.guidance.image_reward import load_image_reward

TEXTS = ["a red star", "a blue circle"]
PREFIX = "image_reward/weights/"


def recorded(name: str) -> Tensor:
    """The networks of these tests are on the CPU."""
    return golden("rewards")[f"image_reward/{name}"].cpu()


def recorded_weights() -> dict[str, Tensor]:
    names = [name[len(PREFIX) :] for name in golden("rewards") if name.startswith(PREFIX)]
    return {name: recorded(f"weights/{name}") for name in names}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("weights") / "ImageReward.pt"
    torch.save(recorded_weights(), found)
    return found


def test_scores_are_those_of_the_package(file: Path) -> None:
    loss = ImageReward(load_image_reward(file), bert_words(), TEXTS)
    images, expected = recorded("images"), recorded("images_score")
    assert float((loss.scores(images) - expected).abs().max()) < 2e-6
    assert float(loss(images)) == pytest.approx(-float(expected.mean()), abs=2e-6)
    for changed in (
        loss.scores(images.flip(0)).flip(0),
        ImageReward(loss.network, bert_words(), "a star").scores(images),
    ):
        assert float((changed - expected).abs().min()) > 1e-3  # both pictures and texts matter


def test_the_gradient_is_that_of_finite_differences(file: Path) -> None:
    loss = ImageReward(load_image_reward(file, dtype=torch.float64), bert_words(), TEXTS)
    check_gradient(loss, smooth_pictures(2, 48, 40).clamp(-0.95, 0.95))
    assert all(parameter.grad is None for parameter in loss.network.parameters())


def test_files_texts_and_sizes(file: Path, tmp_path: Path) -> None:
    bert_words().save_pretrained(tmp_path / "words")
    save_file({name: value.contiguous() for name, value in recorded_weights().items()}, tmp_path / "reward.safetensors")
    images = smooth_pictures(2, 48, 40).clamp(-0.95, 0.95)
    loss = ImageReward.from_pretrained(tmp_path / "reward.safetensors", TEXTS[0], processor=tmp_path / "words")
    both = ImageReward(load_image_reward(file), bert_words(), [TEXTS[0]] * 2)
    assert torch.equal(loss.scores(images), both.scores(images))
    square = resize_and_crop(images / 2 + 0.5, 32) * 2 - 1
    assert relative(loss.scores(square), loss.scores(images)) < 1e-5
    half = ImageReward.from_pretrained(file, TEXTS[0], dtype=torch.bfloat16, processor=tmp_path / "words")
    assert half.scores(images).dtype == torch.float32
    assert float((half.scores(images) - loss.scores(images)).abs().max()) < 0.1


def test_bad_input(file: Path, tmp_path: Path) -> None:
    network = load_image_reward(file)
    with pytest.raises(ValueError, match="prompt: expected 1 text or 2, one for each picture, got 3"):
        ImageReward(network, bert_words(), ["a", "red", "star"])(recorded("images"))
    with pytest.raises(ValueError, match="prompt: expected a text, or a text for each picture, got ' '"):
        ImageReward(network, bert_words(), " ")
    with pytest.raises(TypeError, match="network: expected that of load_image_reward, got Linear"):
        ImageReward(torch.nn.Linear(1, 1), bert_words(), "a star")
    with pytest.raises(TypeError, match="tokenizer: expected that of BERT, got NoneType"):
        ImageReward(network, None, "a star")
    with pytest.raises(ValueError, match="images: expected shape"):
        ImageReward(network, bert_words(), "a star")(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"processor: the folder .*none' does not exist"):
        ImageReward.from_pretrained(file, "a star", processor=tmp_path / "none")


def test_files_with_other_weights(tmp_path: Path) -> None:
    whole = recorded_weights()
    less: dict[str, Any] = {name: value for name, value in whole.items() if "blocks.1.attn.qkv" not in name}
    for state, match in (
        ({"weight": torch.ones(2)}, r"expected the weights of ImageReward in .*, got no blip\.visual_encoder"),
        (less, r"it lacks 'encoder\.layers\.1\.self_attn\.qkv\.bias'"),
        (
            whole | {"blip.text_encoder.pooler": torch.ones(2)},
            r"got 'pooler' too; it is a model of another architecture",
        ),
        (whole | {"mlp.layers.9.weight": torch.ones(2)}, "heads with activations between their layers are others"),
    ):
        torch.save(state, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=match):
            load_image_reward(tmp_path / "other.pt")
