"""Segmentation and depth, against the forward passes of transformers' own models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randn, smooth_pictures
from gradients import check_gradient
from PIL import Image
from torch import Tensor

from doodl_fast.guidance import Depth, Segmentation

CLASSES = {0: "wall", 1: "sky", 2: "tree, oak"}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}


def scaled(model: Any) -> Any:
    """Gives a model weights with which its output depends on the picture, as it does not with those of its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    return model


def segmenter() -> Any:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(**SEGFORMER, id2label=CLASSES, label2id={name: i for i, name in CLASSES.items()})
    return scaled(SegformerForSemanticSegmentation(config).eval())


def estimator() -> Any:
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    config = DPTConfig(
        **sizes,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    model = scaled(DPTForDepthEstimation(config).eval())
    torch.nn.init.constant_(model.head.head[-2].bias, 3.0)  # its ReLU would cut off half of the depths
    return model


def processor(kind: str) -> Any:
    import transformers

    try:
        return getattr(transformers, f"{kind}ImageProcessor")(size={"height": 32, "width": 32})
    except ImportError as error:  # In some versions of transformers SegFormer's needs torchvision.
        pytest.skip(str(error).strip().split("\n")[0])


def pictures(batch: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """On the 256 levels of a saved picture, in [-1, 1]."""
    values = smooth_pictures(batch, height, width, seed).clamp(-0.95, 0.95)
    return ((values / 2 + 0.5) * 255).round() / 255 * 2 - 1


def own_pixels(kind: str, images: Tensor) -> Tensor:
    """What the processor makes of pictures."""
    arrays = ((images / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return processor(kind)([Image.fromarray(array) for array in arrays], return_tensors="pt").pixel_values


def left_half(size: int = 32) -> Tensor:
    return (torch.arange(size) < size // 2).float().expand(size, size)


def test_a_class_everywhere_or_in_a_region() -> None:
    model = segmenter()
    logits = model(own_pixels("Segformer", pictures())).logits
    assert logits.shape == (2, 3, 8, 8)
    wanted = torch.full((2, 8, 8), 2)
    values = F.cross_entropy(logits, wanted, reduction="none").detach()
    whole = Segmentation(model, "oak", processor("Segformer"))(pictures())
    assert float(whole) == pytest.approx(float(values.mean()), rel=1e-4)
    left = Segmentation(model, 2, processor("Segformer"), left_half())(pictures())
    assert float(left) == pytest.approx(float(values[..., :4].mean()), rel=1e-4)
    assert abs(float(left) - float(whole)) > 1e-2


def test_a_map_of_classes() -> None:
    model = segmenter()
    logits = model(own_pixels("Segformer", pictures())).logits
    wanted = (left_half() * 2).long()
    wanted[:5] = -1
    large = F.interpolate(logits, (32, 32), mode="bilinear")
    expected = F.cross_entropy(large, wanted.expand(2, -1, -1), ignore_index=-1)
    loss = Segmentation(model, wanted, processor("Segformer"))
    assert float(loss(pictures())) == pytest.approx(float(expected), rel=1e-4)
    target = pictures(1, seed=4)
    seen = model(own_pixels("Segformer", target)).logits.argmax(1)
    expected = F.cross_entropy(logits, seen.expand(2, -1, -1))
    assert float(Segmentation(model, target, processor("Segformer"))(pictures())) == pytest.approx(
        float(expected), rel=1e-4
    )


def test_depths_up_to_scale_and_shift() -> None:
    model, target = estimator(), pictures(1, seed=4)
    with torch.no_grad():
        ours, theirs = (model(own_pixels("DPT", images)).predicted_depth for images in (pictures(), target))

    def aligned(depths: Tensor) -> Tensor:
        shift = depths.flatten(1).median(1).values[:, None, None]
        return (depths - shift) / (depths - shift).abs().mean((1, 2), keepdim=True)

    loss = Depth(model, target, processor("DPT"))
    assert float(loss(pictures())) == pytest.approx(float((aligned(ours) - aligned(theirs)).abs().mean()), rel=1e-3)
    same = Depth(model, 3 * theirs[0] + 7, processor("DPT"))
    assert float(same(target)) == pytest.approx(0, abs=1e-4) and float(same(pictures())) > 0.1
    metric = Depth(model, theirs, processor("DPT"), left_half(), relative=False)(pictures())
    half = ours.shape[-1] // 2
    expected = (ours - theirs).abs()[..., :half].mean()
    assert float(metric) == pytest.approx(float(expected), rel=1e-3)


LOSSES = {
    "class": lambda: Segmentation(segmenter().double(), 1, processor("Segformer"), left_half()),
    "map": lambda: Segmentation(segmenter().double(), (left_half(48) * 2).long(), processor("Segformer")),
    "relative depth": lambda: Depth(estimator().double(), pictures(1, seed=4).double(), processor("DPT")),
    "metric depth": lambda: Depth(estimator().double(), left_half(), processor("DPT"), left_half(8), relative=False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    loss = LOSSES[name]()
    check_gradient(loss, pictures(2, 40, 36))
    assert all(weight.grad is None and weight.requires_grad for weight in loss.model.parameters())


def test_folders_are_loaded(tmp_path: Path) -> None:
    for model, kind in ((segmenter(), "Segformer"), (estimator(), "DPT")):
        model.save_pretrained(tmp_path / kind)
        processor(kind).save_pretrained(tmp_path / kind)
    loaded = Segmentation.from_pretrained(tmp_path / "Segformer", "sky")
    assert torch.equal(loaded(pictures()), Segmentation(segmenter(), "sky", processor("Segformer"))(pictures()))
    depth = Depth.from_pretrained(tmp_path / "DPT", pictures(1, seed=4), relative=False)
    expected = Depth(estimator(), pictures(1, seed=4), processor("DPT"), relative=False)
    assert torch.equal(depth(pictures()), expected(pictures()))


def test_functions_of_ones_own() -> None:
    kernel = randn(2, 3, 1, 1, seed=3)
    loss = Segmentation(lambda x: F.conv2d(x, kernel.to(x)), 1)
    expected = F.cross_entropy(F.conv2d(pictures().double(), kernel), torch.ones(2, 32, 32, dtype=torch.long))
    assert float(loss(pictures())) == pytest.approx(float(expected), rel=1e-5)
    red = Depth(lambda x: (x[:, 0],), torch.zeros(32, 32), relative=False)
    assert float(red(pictures())) == pytest.approx(float(pictures()[:, 0].abs().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Segmentation(segmenter(), "car"), ValueError, "label: 'car' is not one of the model's 3 classes"),
        (lambda: Segmentation(3, 1), TypeError, "model: expected a network that is called with pictures, got int"),
        (
            lambda: Segmentation(segmenter(), torch.full((8, 8), 255))(pictures()),
            ValueError,
            "target: expected classes below 3, got 255; mark pixels that do not count by -1",
        ),
        (
            lambda: Segmentation(segmenter(), torch.full((8, 8), -1))(pictures()),
            ValueError,
            "region: expected some pixels that count, got none",
        ),
        (
            lambda: Segmentation(segmenter(), torch.zeros(3, 8, 8, dtype=torch.long))(pictures()),
            ValueError,
            "target: expected 1 map or 2, one for each picture, got 3",
        ),
        (
            lambda: Depth(estimator(), torch.zeros(8), processor("DPT")),
            ValueError,
            r"target: expected a tensor of shape \(H, W\) or \(B, H, W\), got shape \(8,\)",
        ),
        (
            lambda: Depth(estimator(), torch.zeros(8, 8), processor("DPT"), torch.ones(3, 8, 8))(pictures()),
            ValueError,
            "region: expected 1 map or 2, one for each picture, got 3",
        ),
        (
            lambda: Depth(segmenter(), torch.zeros(8, 8), processor("DPT"))(pictures()),
            TypeError,
            "model: expected a network that returns a tensor, or 'predicted_depth', got SemanticSegmenterOutput",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
