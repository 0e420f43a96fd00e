"""Losses on pixels: `loss(images)` takes (B, 3, H, W) in [-1, 1] and gives a differentiable scalar, a mean over B.

Anything else that does so will do. transformers is imported when a guide is loaded by name.
"""

from __future__ import annotations

from .aesthetic import Aesthetic
from .classifier import Classifier
from .clip import ClipImage, ClipText, spherical_distance
from .cutouts import random_cutouts
from .one_step import OneStepGuidance, one_step
from .symmetry import Symmetry

__all__ = [
    "Aesthetic",
    "Classifier",
    "ClipImage",
    "ClipText",
    "OneStepGuidance",
    "Symmetry",
    "one_step",
    "random_cutouts",
    "spherical_distance",
]
