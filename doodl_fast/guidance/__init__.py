"""Losses on pictures: `loss(images)` takes pixels (B, 3, H, W) in [-1, 1] and returns a differentiable 0-dim tensor.

Each is a mean over B. Any other function that does so can be used in their place. transformers is imported when a guide
is loaded by name.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from .aesthetic import Aesthetic
from .classifier import Classifier
from .clip import spherical_distance
from .clip_image import ClipImage
from .clip_text import ClipText
from .cutouts import random_cutouts
from .dense import Depth, Segmentation
from .hps import HPSv2
from .image_reward import ImageReward
from .noise import AllNoise, NoiseNorm, NoiseProbability, StartDistance, Whiteness, white_projection
from .open_clip import load_open_clip
from .picture import Picture
from .similarity import Similarity
from .symmetry import Symmetry
from .text_score import PickScore, TextScore

__all__ = [
    "Aesthetic",
    "AllNoise",
    "Classifier",
    "ClipImage",
    "ClipText",
    "Depth",
    "HPSv2",
    "ImageReward",
    "NoiseNorm",
    "NoiseProbability",
    "PickScore",
    "Picture",
    "Segmentation",
    "Similarity",
    "StartDistance",
    "Symmetry",
    "TextScore",
    "Whiteness",
    "load_open_clip",
    "random_cutouts",
    "spherical_distance",
    "white_projection",
]

_MOVED = ("OneStepGuidance", "one_step")


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"doodl_fast.guidance.{name} has moved to doodl_fast.optimization.{name}; the old name will go in version 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module("doodl_fast.optimization"), name)
