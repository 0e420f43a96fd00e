"""Lean gradients of frozen networks: layers that save for the input's gradient alone, and no more than that needs.

PyTorch's layers save what a gradient of their weights would need, and each layer for itself
(https://github.com/pytorch/pytorch/issues/133566). Here a convolution saves a shape, an activation what its input
follows from, and cheap layers are computed again, to the same bits (docs/lean.md). Nothing here is diffusion, and
nothing here changes a caller's modules: `substitute` is given copies.
"""

from .kept import kept_by_operator
from .level import Level, level_of
from .substitution import LeanReport, gains_by_recompute, has_lean_layers, lean_report, substitute

__all__ = [
    "LeanReport",
    "Level",
    "gains_by_recompute",
    "has_lean_layers",
    "kept_by_operator",
    "lean_report",
    "level_of",
    "substitute",
]
