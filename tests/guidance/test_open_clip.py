"""Models of open_clip: its interface around a transformers CLIP, and the package itself where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import smooth_pictures
from gradients import check_gradient
from torch import Tensor, nn

from doodl_fast.guidance import Aesthetic, ClipImage, ClipText, TextScore, load_open_clip
from doodl_fast.guidance.open_clip import OpenClipModel

TEXTS = ["a red star", "a blue circle"]
PREPROCESS = {"size": 32, "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


def pictures(height: int = 48, width: int = 40) -> Tensor:
    return smooth_pictures(2, height, width).clamp(-0.95, 0.95)


class Lookalike(nn.Module):
    """A transformers CLIP with open_clip's methods."""

    def __init__(self, clip: Any, size: Any = 32) -> None:
        super().__init__()
        self.inner, self.context_length, self.logit_scale = clip, 77, clip.logit_scale
        self.visual = nn.Identity()
        self.visual.image_size = size  # type: ignore[assignment]

    def encode_image(self, image: Tensor) -> Tensor:
        found = self.inner.get_image_features(pixel_values=image)
        return found if isinstance(found, Tensor) else found.pooler_output

    def encode_text(self, text: Tensor) -> Tensor:
        found = self.inner.get_text_features(input_ids=text)
        return found if isinstance(found, Tensor) else found.pooler_output


@pytest.fixture
def package(clip: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A module of the name of the package, whose functions return the lookalike, and a folder."""
    (tmp_path / "open_clip_config.json").write_text("{}")
    model, processor = clip
    found = SimpleNamespace(folder=tmp_path, settings=dict(PREPROCESS), asked=[])

    def tokens(texts: list[str], context_length: int) -> Tensor:
        options = {"padding": "max_length", "max_length": context_length, "truncation": True}
        return processor.tokenizer(texts, return_tensors="pt", **options).input_ids

    def create(name: str, **options: Any) -> Any:
        found.asked.append((name, options))
        return Lookalike(model)

    module = ModuleType("open_clip")
    module.__dict__.update(
        create_model_from_pretrained=create,
        get_tokenizer=lambda name: tokens,
        get_model_preprocess_cfg=lambda model: found.settings,
    )
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return found


def test_guides_see_what_they_see_of_the_same_clip(clip: tuple[Any, Any], package: SimpleNamespace) -> None:
    pair = load_open_clip(package.folder)
    head = nn.Linear(16, 1)
    made: list[Any] = [
        lambda model, processor: TextScore(model, processor, TEXTS),
        lambda model, processor: ClipText(model, processor, TEXTS[0]),
        lambda model, processor: ClipImage(model, pictures(40, 40), processor),
        lambda model, processor: Aesthetic(model, processor, head, target=9.0),
    ]
    for make in made:
        assert float(make(*pair)(pictures())) == pytest.approx(float(make(*clip)(pictures())), rel=1e-6)
    assert package.asked[0] == (f"local-dir:{package.folder}", {"return_transform": False, "weights_only": True})
    check_gradient(TextScore(pair[0].double(), pair[1], TEXTS), pictures())
    pair[0].float()


@pytest.mark.parametrize(("mode", "fit"), [("shortest", "crop"), ("squash", "squeeze"), ("longest", "pad")])
def test_ways_of_resizing(package: SimpleNamespace, mode: str, fit: str) -> None:
    package.settings |= {"resize_mode": mode, "interpolation": "bilinear"}
    loss = TextScore(*load_open_clip(package.folder), TEXTS)
    assert (loss.fit, loss.mode, loss.size) == (fit, "bilinear", 32)


def test_what_is_refused(package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, clip: tuple[Any, Any]) -> None:
    package.settings["interpolation"] = "nearest"
    with pytest.raises(ValueError, match=r"guidance model: expected pictures that are resized .* got .*nearest"):
        load_open_clip(package.folder)
    with pytest.raises(ValueError, match=r"guidance model: expected a folder with open_clip_config\.json"):
        load_open_clip(package.folder.parent)
    with pytest.raises(TypeError, match="model: expected a model of open_clip, got Linear"):
        OpenClipModel(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"model: expected one that reads square pictures, got .* \(32, 16\)"):
        OpenClipModel(Lookalike(clip[0], (32, 16)))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"is a model of open_clip, which cannot be .*pip install open_clip_torch"):
        load_open_clip(package.folder)


@pytest.mark.parametrize("squash", [False, True])
def test_a_folder_of_the_real_package(tmp_path: Path, squash: bool) -> None:
    open_clip = pytest.importorskip("open_clip")
    sizes = {"width": 16, "layers": 1, "heads": 2}
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    settings = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": {**sizes, "context_length": 20}}
    preprocess = {**PREPROCESS, "resize_mode": "squash" if squash else "shortest", "interpolation": "bicubic"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    loss = TextScore(*load_open_clip(tmp_path, dtype=torch.float64), TEXTS)
    mean, std = (torch.tensor(PREPROCESS[name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    images = pictures(32, 32)
    with torch.no_grad():
        expected = model.get_logits((images / 2 + 0.5 - mean) / std, tokens)[0].diagonal()
    assert float((loss.scores(images) - expected).abs().max()) < 1e-5 * float(model.logit_scale.detach().exp())
    assert loss.fit == ("squeeze" if squash else "crop")
    check_gradient(loss, pictures())
