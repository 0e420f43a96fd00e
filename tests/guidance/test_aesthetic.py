"""The aesthetic guide and the files of its heads."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import smooth_pictures
from gradients import check_gradient
from safetensors.torch import save_file
from torch import Tensor, nn

from doodl_fast.guidance import Aesthetic
from doodl_fast.guidance.aesthetic import load_aesthetic_head


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(16, 1)
    nn.init.constant_(layer.bias, 5.0)
    return layer


def pictures() -> Tensor:
    return smooth_pictures(2, 32, 32)


def test_the_score_is_the_heads_of_the_models_own_embedding(clip: tuple[Any, Any], head: nn.Linear) -> None:
    model, processor = clip
    loss = Aesthetic(model, processor, head)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (loss.mean, loss.std))
    with torch.no_grad():
        embedded = model.get_image_features(pixel_values=(pictures() / 2 + 0.5 - mean) / std)
        embedded = embedded if isinstance(embedded, Tensor) else embedded.pooler_output
        scores = head(F.normalize(embedded, dim=-1))
    assert float(loss.score(pictures())) == pytest.approx(float(scores.mean()), rel=1e-6)
    assert float(loss(pictures())) == -float(loss.score(pictures()))
    aimed = Aesthetic(model, processor, head, target=7.5)
    assert float(aimed(pictures())) == pytest.approx(7.5 - float(scores.mean()), rel=1e-6)


def test_descending_raises_the_score_and_leaves_the_weights_alone(clip: tuple[Any, Any], head: nn.Linear) -> None:
    loss, images = Aesthetic(*clip, head), pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(images), images)
    better = images.detach() - 1e-2 * gradient / gradient.abs().max()
    assert float(loss.score(better)) > float(loss.score(images.detach()))
    loss(images).backward()
    assert head.weight.grad is None and all(p.grad is None for p in clip[0].parameters())


def test_scores_end_at_one_and_ten(clip: tuple[Any, Any], head: nn.Linear) -> None:
    for bias, score in ((50.0, 10.0), (-50.0, 1.0)):
        nn.init.constant_(head.bias, bias)
        assert float(Aesthetic(*clip, head).score(pictures())) == score


def test_heads_from_files(tmp_path: Path, head: nn.Linear) -> None:
    save_file(dict(head.state_dict()), tmp_path / "head.safetensors")
    torch.save(head.state_dict(), tmp_path / "head.pth")
    torch.save({name: value.half() for name, value in head.state_dict().items()}, tmp_path / "half.pth")
    for name, digits in (("head.safetensors", 0.0), ("head.pth", 0.0), ("half.pth", 1e-3)):
        loaded = load_aesthetic_head(tmp_path / name)
        assert loaded.weight.dtype == torch.float32 and not loaded.weight.requires_grad
        assert torch.allclose(loaded.weight, head.weight, rtol=digits, atol=digits)
        assert torch.equal(loaded.bias, head.bias)


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle was run')",)


def test_files_that_hold_no_head(tmp_path: Path, head: nn.Linear, clip: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"head: .*none.pth' does not exist"):
        load_aesthetic_head(tmp_path / "none.pth")
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"weight": Bomb()}, tmp_path / "zipped.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("bomb.pth", "zipped.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=f"head: .*{name}.* cannot be read as safetensors or a plain state dict"):
            load_aesthetic_head(tmp_path / name)
    for state in ({"weight": head.weight.data}, {"weight": head.weight.data.T, "bias": head.bias.data}, [1.0]):
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(
            ValueError, match=r"head: expected a weight of shape \(1, D\) and a bias of shape \(1,\) in"
        ):
            load_aesthetic_head(tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"head: expected one for embeddings of 16 features .the model's., got one for 9"
    ):
        Aesthetic(*clip, nn.Linear(9, 1))(pictures())
    with pytest.raises(TypeError, match=r"head: expected an nn.Linear to one score, got Linear.in_features=9"):
        Aesthetic(*clip, nn.Linear(9, 2))
    with pytest.raises(ValueError, match="target: expected a score or None, got nan"):
        Aesthetic(*clip, head, target=float("nan"))


SIZES = (1024, 128, 64, 16, 1)


class Stack(nn.Module):
    """The layers of the published heads, in their order and with their names."""

    def __init__(self, name: str, features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size_in, size_out in zip((features, *SIZES), SIZES, strict=False):
            layers += [nn.Linear(size_in, size_out), nn.Dropout(0.2)]
        del layers[-1]
        if name == "layers":
            del layers[7]  # LAION's last two layers have no dropout between them
        setattr(self, name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        (layers,) = self.children()
        return layers(x)


def stack(name: str, features: int) -> Stack:
    torch.manual_seed(0)
    found = Stack(name, features).double().eval()
    nn.init.constant_(getattr(found, name)[-1].bias, 5.0)
    return found


@pytest.mark.parametrize("name", ["layers", "scoring_head"])
def test_heads_of_several_layers(tmp_path: Path, name: str) -> None:
    whole = stack(name, 48)
    state = {key: value.float() for key, value in whole.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    save_file(state, tmp_path / "head.safetensors")
    features = F.normalize(torch.randn(5, 48, dtype=torch.float64), dim=-1)
    expected = whole(features).detach()
    for file in ("head.pth", "head.safetensors"):
        got = load_aesthetic_head(tmp_path / file).double()(features)
        assert float((got - expected).abs().max()) < 1e-6
    assert float(expected.std()) > 1e-3


def test_a_siglip_with_its_head(tmp_path: Path) -> None:
    """The score of aesthetic-predictor-v2-5: the head on the normalised pooled output of the vision tower."""
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)
    config = SiglipConfig(text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    model, whole = SiglipModel(config).double().eval(), stack("scoring_head", 16)
    torch.save({key: value.float() for key, value in whole.state_dict().items()}, tmp_path / "head.pth")
    processor = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3, size={"height": 32, "width": 32})
    loss = Aesthetic(model, processor, load_aesthetic_head(tmp_path / "head.pth"))
    images = smooth_pictures(2, 32, 32).clamp(-0.95, 0.95).double()
    pooled = model.vision_model(pixel_values=images).pooler_output
    expected = whole(pooled / pooled.norm(dim=-1, keepdim=True)).mean()
    assert float(loss.score(images)) == pytest.approx(float(expected.detach()), abs=1e-6)
    check_gradient(loss, smooth_pictures(2, 40, 24).clamp(-0.95, 0.95))
    assert loss.fit == "squeeze"


def test_other_stacks_of_layers(tmp_path: Path) -> None:
    whole = stack("layers", 8).state_dict()
    relu = {name.replace(".2.", ".3."): value for name, value in whole.items()}
    for state, match in (
        (relu, "heads with activations between their layers are others"),
        ({**whole, "layers.2.weight": torch.zeros(128, 7)}, "expected layers of which each fits to the next in"),
        (
            {**whole, "layers.7.weight": torch.zeros(2, 16), "layers.7.bias": torch.zeros(2)},
            "expected layers that end in one score in",
        ),
    ):
        torch.save(state, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=f"head: {match}" if match.startswith("expected") else match):
            load_aesthetic_head(tmp_path / "head.pth")


def test_from_pretrained(tmp_path: Path, clip: tuple[Any, Any], head: nn.Linear) -> None:
    for part in clip:
        part.save_pretrained(tmp_path / "clip")
    torch.save(head.state_dict(), tmp_path / "head.pth")
    loss = Aesthetic.from_pretrained(tmp_path / "clip", tmp_path / "head.pth", target=6.0)
    assert float(loss(pictures())) == pytest.approx(float(Aesthetic(*clip, head, 6.0)(pictures())), rel=1e-5)
