"""Similarity by DINO, DINOv2 and other networks, against transformers' own models; distances of a caller's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randn, smooth_pictures
from gradients import check_gradient
from PIL import Image
from torch import Tensor, nn

from doodl_fast.guidance import Picture, Similarity

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def dino() -> Any:
    """A tiny DINO, which has no pooling layer."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    return ViTModel(ViTConfig(**SIZES, intermediate_size=16), add_pooling_layer=False).eval()


def dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    return Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=1)).eval()


def with_registers() -> Any:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(2)
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, mlp_ratio=1, num_register_tokens=2)).eval()


MODELS = {"DINO": dino, "DINOv2": dinov2, "DINOv2 with registers": with_registers}


def processor() -> Any:
    from transformers import BitImageProcessor

    return BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def pictures(batch: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """On the 256 levels of a saved picture, in [-1, 1]."""
    values = smooth_pictures(batch, height, width, seed).clamp(-0.95, 0.95)
    return ((values / 2 + 0.5) * 255).round() / 255 * 2 - 1


def own_pixels(images: Tensor) -> Tensor:
    """What the processor makes of pictures."""
    arrays = ((images / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return processor()([Image.fromarray(array) for array in arrays], return_tensors="pt").pixel_values


@pytest.mark.parametrize("look", ["whole", "patches"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_cosine_of_the_models_own_features(name: str, look: str) -> None:
    model, target = MODELS[name](), pictures(1, seed=5)
    loss = Similarity(model, target, processor(), look=look)
    tokens = [model(own_pixels(images)).last_hidden_state for images in (pictures(), target)]
    ours, theirs = (t[:, :1] if look == "whole" else t[:, -16:] for t in tokens)  # 16 patches of 8 x 8 pixels
    expected = 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
    assert float(loss(pictures()).detach()) == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > 1e-3
    assert float(loss(target)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("look", ["whole", "patches"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_finite_differences(name: str, look: str) -> None:
    model = MODELS[name]().double()
    loss = Similarity(model, pictures(seed=5).double(), processor(), look=look)
    check_gradient(loss, pictures(2, 40, 36))
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_a_network_of_ones_own_for_faces() -> None:
    """From normalised crops to vectors of any length, in the network's own dtype."""
    torch.manual_seed(0)
    face = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(196, 8))
    before = {name: value.clone() for name, value in face.state_dict().items()}
    person, images = pictures(1, seed=3), pictures()
    found = Similarity(face, person)(images)  # in eval mode
    assert face.training and all(torch.equal(before[name], value) for name, value in face.state_dict().items())
    face.eval()
    with torch.no_grad():
        expected = 1 - F.cosine_similarity(face(images), face(person)).mean()
        large = [F.pad(p, (16, 16, 16, 16)) for p in (images, person)]
        cut = Similarity(lambda x: face(x[..., 16:48, 16:48]), large[1])(large[0])
        half = Similarity(face.half(), person)(images)
    assert float(expected) > 1e-3
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(cut) == pytest.approx(float(expected), rel=1e-5)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(float(expected), rel=2e-2)


def test_maps_of_convolutional_networks() -> None:
    kernel = randn(6, 3, 4, 4, seed=2)
    loss = Similarity(lambda x: (F.conv2d(x, kernel.to(x), stride=4),), pictures(seed=4), look="patches")
    ours, theirs = (F.conv2d(p.double(), kernel, stride=4) for p in (pictures(), pictures(seed=4)))
    assert float(loss(pictures()).detach()) == pytest.approx(
        float(1 - F.cosine_similarity(ours, theirs).mean()), rel=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_loaded(name: str, tmp_path: Path) -> None:
    model, target = MODELS[name](), pictures(1, seed=5)
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loss = Similarity.from_pretrained(tmp_path, target)
    assert torch.equal(loss(pictures()), Similarity(model, target, processor())(pictures()))
    file = tmp_path / "target.png"
    Image.fromarray(((target[0] / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
    assert float(Similarity.from_pretrained(tmp_path, file)(pictures())) == pytest.approx(float(loss(pictures())))


def test_bad_input_is_refused(clip: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a network that is called with pictures, .* take ClipImage"):
        Similarity(clip[0], pictures())
    with pytest.raises(ValueError, match="look: expected one of 'whole', 'patches', got 'face'"):
        Similarity(dino(), pictures(), look="face")
    with pytest.raises(ValueError, match="target: expected 1 picture or 3 with features of shape"):
        Similarity(dino(), pictures())(pictures(3))
    with pytest.raises(ValueError, match=r"model: expected one with features for look='patches', got shape \(2, 3\)"):
        Similarity(lambda x: x.mean((2, 3)), pictures(), look="patches")
    with pytest.raises(ValueError, match="target: expected shape"):
        Similarity(dino(), torch.zeros(3, 8, 8))


# distances of a caller's own, LPIPS for instance


class Distance(nn.Module):
    """Like an LPIPS: a module with two arguments and weights that require grad."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Tanh()).double()

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        assert not self.training and images.shape == target.shape
        return (self.layers(images) - self.layers(target)).square().mean((1, 2, 3), keepdim=True)


def test_a_distance_of_ones_own() -> None:
    network, target = Distance(), pictures(1, seed=5).double()
    loss = Picture(target, network)
    images = pictures().double()
    leaf = images.clone().requires_grad_()
    loss(leaf).backward()
    assert network.training and all(weight.grad is None for weight in network.parameters())
    other = images.clone().requires_grad_()
    network.eval()(other, target.expand(2, -1, -1, -1)).mean().backward()
    assert torch.allclose(leaf.grad, other.grad, rtol=1e-12, atol=1e-15) and float(leaf.grad.norm()) > 1e-4


def test_lpips() -> None:
    """What the package lpips computes, with random weights."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    network = lpips.LPIPS(pretrained=False, pnet_rand=True, net="squeeze", verbose=False)
    target, images = pictures(1, 64, 64, seed=5), pictures(2, 64, 64)
    leaf, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    value = Picture(target, network)(leaf)
    value.backward()
    expected = network.eval()(other, target).mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5) and abs(value.item()) > 1e-4
    assert torch.allclose(leaf.grad, other.grad, rtol=1e-4, atol=1e-9) and float(leaf.grad.norm()) > 1e-4


def test_bad_distances_are_refused() -> None:
    with pytest.raises(TypeError, match="distance: expected a function of two batches of pictures, got int"):
        Picture(pictures(), 3)
    with pytest.raises(TypeError, match="distance: expected a function that returns a tensor, got float"):
        Picture(pictures(), lambda a, b: 1.0)(pictures())
    with pytest.raises(ValueError, match="target: expected 1 picture or 3, one for each, got 2"):
        Picture(pictures(), lambda a, b: a - b)(pictures(3))
