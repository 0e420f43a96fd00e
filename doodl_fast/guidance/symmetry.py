"""`Symmetry`: guidance to pictures that equal their mirror images, without a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cutouts import check_images

AXES = {"horizontal": -1, "vertical": -2}


class Symmetry:
    """The mean squared difference between pictures and their mirror images.

    Args:
        direction: "horizontal" compares left with right, "vertical" top with bottom.

    Raises:
        ValueError: `direction` is neither.
    """

    def __init__(self, direction: str = "horizontal") -> None:
        if direction not in AXES:
            raise ValueError(f"direction: expected one of {', '.join(map(repr, AXES))}, got {direction!r}")
        self.direction = direction

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of images (B, 3, H, W) in [-1, 1]."""
        images = check_images(images)
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return F.mse_loss(images, images.flip(AXES[self.direction]))
