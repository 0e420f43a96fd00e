"""The embedded pipeline: a small Stable Diffusion for pictures of coloured shapes, its guides, and a measure.

The models have the classes and file formats of Stable Diffusion. They were trained from scratch by
`doodl_fast.shapes.train` and are part of the package, so that tests and the demo need no download.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .measure import Reading, Verdict, judge, read
from .scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZE,
    VARIETIES,
    VARIETY_NAMES,
    Object,
    Prompt,
    Scene,
    Thing,
    place,
    prompts,
    render,
    sample,
)

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

__all__ = [
    "COLOURS",
    "RELATIONS",
    "SHAPES",
    "SIZE",
    "VARIETIES",
    "VARIETY_NAMES",
    "WEIGHTS",
    "Object",
    "Prompt",
    "Reading",
    "Scene",
    "Thing",
    "Verdict",
    "judge",
    "load_classifier",
    "load_clip",
    "load_pipeline",
    "place",
    "prompts",
    "read",
    "render",
    "sample",
]

WEIGHTS = Path(__file__).parent / "weights"


def _folder(name: str) -> Path:
    """Returns the folder of one of the models. Raises FileNotFoundError if it is missing."""
    folder = WEIGHTS / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: the embedded weights are missing; reinstall doodl-fast, or train them with "
            "`python -m doodl_fast.shapes.train --work DIR`"
        )
    return folder


def load_pipeline(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """Loads the diffusers pipeline, with pictures of 64 x 64 pixels, latents (B, 4, 16, 16) and a DDIM scheduler.

    Args:
        device: The device of the networks.
        dtype: Their dtype, float32 by default. They are stored in fp16.

    Raises:
        FileNotFoundError: The weights are missing.
    """
    import torch

    from ..diffusion.pipeline import load_pipeline as load

    pipeline: StableDiffusionPipeline = load(_folder("pipeline"), device, dtype or torch.float32)
    return pipeline


def load_clip(device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Loads the CLIP model for pictures of shapes.

    Args:
        device: The device of the model.

    Returns:
        A transformers CLIPModel in float32 and in eval mode, and its processor.

    Raises:
        FileNotFoundError: The weights are missing.
    """
    from ..guidance.clip import load_clip as load

    return load(_folder("clip"), device)


def load_classifier(device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Loads the classifier of the varieties of shapes, whose classes are `VARIETY_NAMES`.

    Args:
        device: The device of the model.

    Returns:
        A transformers image-classification model in float32 and in eval mode, and its image processor.

    Raises:
        FileNotFoundError: The weights are missing.
    """
    from ..guidance.classifier import load_classifier as load

    return load(_folder("classifier"), device)
