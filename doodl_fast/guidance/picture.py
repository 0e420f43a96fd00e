"""`Picture`: a loss that draws pictures towards a given one, pixel by pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..diffusion.images import open_picture
from .cutouts import check_images


class Picture:
    """The mean squared distance of pictures to a target picture.

    Args:
        target: A floating tensor (1 or B, 3, H, W) in [-1, 1], a file, or a PIL picture. It is resized to the size of
            the pictures that it is compared with.

    Raises:
        ValueError: The file cannot be read, or the tensor holds no pictures.

    Example:
        >>> loss = Picture("dog.png")
    """

    def __init__(self, target: Tensor | str | Path | Any) -> None:
        self.target = check_images(target if isinstance(target, Tensor) else open_picture(target, "target"))

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the 0-dim loss of images (B, 3, H, W) in [-1, 1]."""
        images = check_images(images).float()
        target = self.target.detach().to(images)
        if target.shape[-2:] != images.shape[-2:]:
            target = F.interpolate(target, images.shape[-2:], mode="bicubic", antialias=True).clamp(-1, 1)
        return (images - target).square().mean()
