"""Classes of pixels from networks that return masks: MaskFormer (arXiv 2107.06278), Mask2Former, EoMT and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KINDS = ("maskformer", "mask2former", "eomt", "eomt_dinov3")
"""The `model_type` of models that return masks and are called with pictures alone."""

OTHERS = {
    "oneformer": "it reads a task as a text beside the picture",
    "detr": "its masks belong to boxes of things, and leave pixels without a class",
    "videomt": "it reads videos",
}
"""Why other models that return masks are refused, by `model_type`."""


def has_masks(output: Any) -> bool:
    """Whether what a network returns has masks, and the logits of a class for each of them."""
    return all(isinstance(getattr(output, f"{name}_queries_logits", None), Tensor) for name in ("class", "masks"))


def mask_logits(output: Any) -> Tensor:
    """Computes logits of classes for every pixel of what a network for masks returns.

    The score of a class at a pixel is the sum over masks of the class's probability for the mask times the mask's
    probability at the pixel. It is that of MaskFormer's "semantic inference", which transformers'
    `post_process_semantic_segmentation` computes. Its logarithm is the logit, so that probabilities are
    these scores, divided by their sum over all classes.

    Args:
        output: An object with `class_queries_logits` (B, masks, classes + 1), the last of which is for no object, and
            `masks_queries_logits` (B, masks, rows, columns).

    Returns:
        Logits (B, classes, rows, columns), in float32 at least.
    """
    classes, masks = output.class_queries_logits, output.masks_queries_logits
    wide = torch.promote_types(classes.dtype, torch.float32)
    shares = classes.to(wide).softmax(-1)[..., :-1]
    scores = torch.einsum("bqc,bqhw->bchw", shares, masks.to(wide).sigmoid())
    return scores.clamp(min=torch.finfo(wide).tiny).log()
