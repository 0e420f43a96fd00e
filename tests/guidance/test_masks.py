"""Segmentation by networks that return masks, against what transformers itself makes of their outputs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randn
from gradients import check_gradient
from test_dense import CLASSES, left_half, own_pixels, pictures, scaled
from torch import Tensor

from doodl_fast.guidance import Segmentation

NAMES = {"id2label": CLASSES, "label2id": {name: i for i, name in CLASSES.items()}}
SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 1],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def maskformer() -> Any:
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, SwinConfig

    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5}
    decoder = DetrConfig(**sizes, **heads, encoder_layers=1, decoder_layers=2, use_timm_backbone=False)
    swin = SwinConfig(**{name: value for name, value in SWIN.items() if name != "model_type"})
    config = MaskFormerConfig(
        backbone_config=swin, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, **NAMES
    )
    return scaled(MaskFormerForInstanceSegmentation(config).eval())


def mask2former() -> Any:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    swin = SwinConfig(**{name: value for name, value in SWIN.items() if name != "model_type"})
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=5,
        **NAMES,
    )
    return scaled(Mask2FormerForUniversalSegmentation(config).eval())


def eomt() -> Any:
    from transformers import EomtConfig, EomtForUniversalSegmentation

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_blocks": 1}
    config = EomtConfig(**sizes, image_size=32, patch_size=8, num_upscale_blocks=1, num_queries=5, **NAMES)
    model = scaled(EomtForUniversalSegmentation(config).eval())
    model.attn_mask_probs.zero_()  # as training leaves it: its masks of attention, in float32, are for training alone
    return model


MODELS = {"MaskFormer": maskformer, "Mask2Former": mask2former, "Eomt": eomt}


def processor(kind: str) -> Any:
    """The kind's image processor, which needs no torchvision."""
    import transformers

    name = f"{kind}ImageProcessorPil" if hasattr(transformers, f"{kind}ImageProcessorPil") else f"{kind}ImageProcessor"
    size = {"size": {"height": 32, "width": 32}, "do_resize": True}
    return getattr(transformers, name)(**size)


def scores_of(output: Any) -> Tensor:
    """The scores (B, classes, rows, columns) of transformers' own MaskFormer, which resizes nothing."""
    found = processor("MaskFormer").post_process_semantic_segmentation(output, return_segmentation_scores=True)
    return torch.stack([one.segmentation_scores for one in found])


@pytest.mark.parametrize("kind", MODELS)
def test_classes_of_pixels_are_the_packages_own(kind: str) -> None:
    model, images = MODELS[kind](), pictures()
    with torch.no_grad():
        scores = scores_of(model(own_pixels("Segformer", images)))
    loss = Segmentation(model, "sky", SimpleNamespace(image_mean=MEAN, image_std=STD, size={"height": 32, "width": 32}))
    logits = loss.maps(images)
    assert logits.shape == scores.shape and float(scores.std()) > 1e-3
    assert torch.allclose(logits.softmax(1), scores / scores.sum(1, keepdim=True), atol=1e-4)
    assert torch.equal(logits.argmax(1), scores.argmax(1))
    expected = -(scores / scores.sum(1, keepdim=True)).log()[:, 1].mean()
    assert float(loss(images)) == pytest.approx(float(expected), rel=1e-4)


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_maps_of_mask2former_as_its_processor_makes_them() -> None:
    """With masks of the 384 x 384 pixels to which that processor resizes them."""
    generator = torch.Generator().manual_seed(0)
    output = SimpleNamespace(
        class_queries_logits=3 * torch.randn(2, 5, 4, generator=generator),
        masks_queries_logits=3 * torch.randn(2, 5, 384, 384, generator=generator),
    )
    expected = torch.stack(processor("Mask2Former").post_process_semantic_segmentation(output))
    assert len(expected.unique()) == 3
    assert torch.equal(Segmentation(lambda x: output, 0).maps(pictures()).argmax(1), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    model = MODELS[kind]().double()
    check_gradient(Segmentation(model, 1, region=left_half(), size=32), pictures(2, 40, 36), rel=1e-4)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_the_classes_of_a_picture() -> None:
    kernel, classes = 9 * randn(5, 3, 1, 1, seed=3), 3 * randn(1, 5, 4, seed=4)

    def network(x: Tensor) -> Any:
        masks = F.conv2d(x, kernel.to(x))
        return SimpleNamespace(masks_queries_logits=masks, class_queries_logits=classes.to(x).expand(len(x), -1, -1))

    target = pictures(1, seed=4).double()
    loss = Segmentation(network, target)
    expected = torch.stack(processor("MaskFormer").post_process_semantic_segmentation(network(target)))
    assert torch.equal(loss.classes, expected) and len(expected.unique()) > 1
    check_gradient(loss, pictures(2))


def test_a_class_that_no_mask_has_still_has_a_finite_loss() -> None:
    output = SimpleNamespace(
        class_queries_logits=torch.tensor([[[0.0, -300.0, 0.0]]]),
        masks_queries_logits=torch.zeros(1, 1, 2, 2),
    )
    value = Segmentation(lambda x: output, 1)(pictures(1))
    assert torch.isfinite(value) and float(value) == pytest.approx(126 * math.log(2) - math.log(4), rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_folders_are_loaded(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    loaded = Segmentation.from_pretrained(tmp_path, "oak", size=32)
    assert type(loaded.model) is type(model)
    expected = Segmentation(model, 2, size=32)(pictures())
    assert float(loaded(pictures())) == pytest.approx(float(expected), rel=1e-5)


def test_models_that_ask_for_more_than_a_picture_are_refused(tmp_path: Path) -> None:
    from transformers import OneFormerConfig

    OneFormerConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected one that gives every pixel .* a oneformer: it reads a task"):
        Segmentation.from_pretrained(tmp_path, 1)
    boxes = SimpleNamespace(logits=torch.zeros(1, 5, 4), pred_masks=torch.zeros(1, 5, 8, 8))
    with pytest.raises(TypeError, match=r"model: expected logits \(N, classes, rows, columns\), got shape \(1, 5, 4\)"):
        Segmentation(lambda x: boxes, 1)(pictures(1))


def test_resized_maps() -> None:
    """A map of another size than the masks: logits are resized, as those of other networks."""
    model = maskformer()
    wanted = (left_half(48) * 2).long()
    loss = Segmentation(model, wanted, size=32)
    logits = F.interpolate(loss.maps(pictures()), (48, 48), mode="bilinear")
    assert float(loss(pictures())) == pytest.approx(float(F.cross_entropy(logits, wanted.expand(2, -1, -1))), rel=1e-5)
