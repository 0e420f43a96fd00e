"""HPSv2 against what the hpsv2 package computed with the same weights, and files of open_clip's names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
import torch.nn.functional as F
from conftest import golden, relative, smooth_pictures
from gradients import check_gradient
from safetensors.torch import save_file
from torch import Tensor

from doodl_fast.guidance import HPSv2, TextScore
from doodl_fast.guidance.cutouts import resize_and_pad
from doodl_fast.guidance.hps import load_open_clip_file

TEXTS = ["a red star", "a blue circle"]


def recorded(name: str) -> Tensor:
    """The models of these tests are on the CPU."""
    return golden("rewards")[f"hps/{name}"].cpu()


def recorded_weights() -> dict[str, Tensor]:
    return {name[12:]: recorded(name[4:]) for name in golden("rewards") if name.startswith("hps/weights/")}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import CLIPImageProcessor, CLIPProcessor

    words = tiny_pipeline.tokenizer(tmp_path_factory.mktemp("hps"))
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPProcessor(pictures, words)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("weights") / "HPS.pt"
    torch.save({"epoch": 3, "state_dict": recorded_weights()}, found)
    return found


@pytest.mark.parametrize("name", ["images", "wide"])
def test_scores_are_those_of_the_package(file: Path, processor: Any, name: str) -> None:
    loss = HPSv2(load_open_clip_file(file), processor, TEXTS)
    images, expected = recorded(name), recorded(f"{name}_score")
    assert float((loss.scores(images) - expected).abs().max()) < 1e-6
    assert float(loss(images)) == pytest.approx(-float(expected.mean()), abs=1e-6)
    assert float((expected[0] - expected[1]).abs()) > 1e-2


def test_the_gradient_is_that_of_finite_differences(file: Path, processor: Any) -> None:
    loss = HPSv2(load_open_clip_file(file, dtype=torch.float64), processor, TEXTS)
    check_gradient(loss, recorded("wide"))
    assert all(parameter.grad is None for parameter in loss.model.parameters())


def test_files_and_folders(file: Path, processor: Any, tmp_path: Path) -> None:
    images = recorded("wide")
    processor.save_pretrained(tmp_path / "processor")
    from_pt = HPSv2.from_pretrained(file, TEXTS, processor=tmp_path / "processor")
    save_file({name: value.contiguous() for name, value in recorded_weights().items()}, tmp_path / "hps.safetensors")
    from_safetensors = HPSv2.from_pretrained(tmp_path / "hps.safetensors", TEXTS, processor=tmp_path / "processor")
    for part in (from_pt.model, processor):
        part.save_pretrained(tmp_path / "folder")
    from_folder = HPSv2.from_pretrained(tmp_path / "folder", TEXTS)
    assert isinstance(from_folder, HPSv2)
    for loss in (from_safetensors, from_folder):
        assert torch.equal(loss.scores(images), from_pt.scores(images))
    logits = TextScore(from_pt.model, processor, TEXTS).scores(images[..., 13:37])
    scale = float(from_pt.model.logit_scale.detach().exp())
    assert relative(logits, scale * from_pt.scores(images[..., 13:37])) < 1e-6


@pytest.mark.parametrize(("height", "width"), [(96, 64), (50, 70), (20, 24), (32, 32), (400, 2)])
def test_padding(height: int, width: int) -> None:
    images = smooth_pictures(2, height, width) / 2 + 0.5
    out = resize_and_pad(images, 32)
    scale = 32 / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (32 - rows) // 2, (32 - columns) // 2
    inside = out[..., top : top + rows, left : left + columns]
    expected = F.interpolate(images, (rows, columns), mode="bicubic", antialias=True)
    assert out.shape == (2, 3, 32, 32) and torch.allclose(inside, expected)
    assert float(out.abs().sum()) == pytest.approx(float(inside.abs().sum()), rel=1e-6)


def test_files_with_other_weights(file: Path, processor: Any, tmp_path: Path) -> None:
    def refused(state: Any, match: str) -> None:
        torch.save(state, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=match):
            load_open_clip_file(tmp_path / "other.pt")

    whole = recorded_weights()
    refused({"state_dict": [1.0]}, "guidance model: expected the weights of an open_clip CLIP.*a dict of other values")
    refused({"weight": torch.zeros(2)}, r"which lacks 'token_embedding\.weight', 'positional_embedding'")
    refused({k: v for k, v in whole.items() if k != "visual.proj"}, r"it lacks 'visual_projection\.weight'")
    refused(whole | {"visual.attn_pool": torch.zeros(2)}, r"got 'visual\.attn_pool' too; it is a model of another arch")
    shorter = copy.deepcopy(whole) | {"ln_final.weight": torch.ones(4)}
    refused(shorter, r"'text_model\.final_layer_norm\.weight' of shape \(4,\) instead of \(16,\)")
    with pytest.raises(ValueError, match=r"guidance model: the file 'none.pt' does not exist"):
        load_open_clip_file("none.pt")
    with pytest.raises(ValueError, match=r"processor: the folder .*nowhere' does not exist"):
        HPSv2.from_pretrained(file, TEXTS, processor=tmp_path / "nowhere")
