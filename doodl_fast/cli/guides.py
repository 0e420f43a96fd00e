"""The guides of `doodl-fast run`: one function each, (its arguments, device, dtype) -> a loss on pixels."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EMBEDDED = "shapes"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"


def _clip(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    if args.model == EMBEDDED and args.guidance_model in (None, EMBEDDED):
        from .. import shapes

        model, processor = shapes.load_clip()
        return model.to(device, dtype), processor
    from ..guidance.clip import load_clip

    return load_clip(args.guidance_model or DEFAULT_CLIP, device, dtype)


def _clip_text(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from ..guidance import ClipText

    model, processor = _clip(args, device, dtype)
    text = args.prompt if args.guidance_prompt is None else args.guidance_prompt
    return ClipText(model, processor, text, args.num_cutouts, args.cut_power)


def _clip_image(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from ..guidance import ClipImage

    if not args.guidance_image:
        raise ValueError("--guidance-image: expected one or more files with --guidance clip-image, got none")
    model, processor = _clip(args, device, dtype)
    return ClipImage(model, args.guidance_image, processor, args.num_cutouts, args.cut_power)


def _classifier(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from ..guidance import Classifier

    if args.label is None:
        raise ValueError("--label: expected a class's name or index with --guidance classifier, got none")
    if args.model == EMBEDDED and args.guidance_model in (None, EMBEDDED):
        from .. import shapes

        model, processor = shapes.load_classifier()
        return Classifier(model.to(device, dtype), processor, args.label)
    if args.guidance_model is None:
        raise ValueError("--guidance-model: expected an image classifier with --guidance classifier, got none")
    return Classifier.from_pretrained(args.guidance_model, args.label, device, dtype)


def _symmetry(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from ..guidance import Symmetry

    return Symmetry(args.direction)


GUIDES: dict[str, Callable[[argparse.Namespace, torch.device, torch.dtype], Callable[[Tensor], Tensor]]] = {
    "clip-text": _clip_text,
    "clip-image": _clip_image,
    "classifier": _classifier,
    "symmetry": _symmetry,
}
