"""`Picture`: a loss that draws pictures towards a given one, by their pixels or by a distance of the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.module_copies import frozen_copy
from .cutouts import check_images
from .view import target_pictures


class Picture:
    """The distance of pictures to a target picture: the mean squared one, or any other.

    Args:
        target: A floating tensor (1 or B, 3, H, W) in [-1, 1], a file, or a PIL picture. It is resized to the size of
            the pictures that it is compared with.
        distance: Takes the pictures and the target, both (B, 3, H, W) in [-1, 1] and in float32 at least, and returns
            distances, whose mean is the loss. It may be a module, an LPIPS for instance, which is called in eval mode
            and without gradients of its weights, and is not changed. None for the mean squared difference.

    Raises:
        TypeError: `distance` cannot be called.
        ValueError: The file cannot be read, or the tensor holds no pictures.

    Example:
        >>> loss = Picture("dog.png")
        >>> loss = Picture("dog.png", lpips.LPIPS(net="vgg"))  # from the package lpips
    """

    def __init__(
        self, target: Tensor | str | Path | Any, distance: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        if distance is not None and not callable(distance):
            raise TypeError(f"distance: expected a function of two batches of pictures, got {type(distance).__name__}")
        self.target = target_pictures(target)
        self.distance = distance

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the 0-dim loss of images (B, 3, H, W) in [-1, 1]."""
        images = check_images(images)
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        target = self.target.detach().to(images)
        if target.shape[-2:] != images.shape[-2:]:
            target = F.interpolate(target, images.shape[-2:], mode="bicubic", antialias=True).clamp(-1, 1)
        if self.distance is None:
            return (images - target).square().mean()
        if len(target) not in (1, len(images)):
            raise ValueError(f"target: expected 1 picture or {len(images)}, one for each, got {len(target)}")
        with frozen_copy(self.distance) as distance:
            found = distance(images, target.expand_as(images))
        if not isinstance(found, Tensor):
            raise TypeError(f"distance: expected a function that returns a tensor, got {type(found).__name__}")
        return found.mean()
