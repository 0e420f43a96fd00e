"""What guides see of pictures: random cutouts, or the whole picture in the guide's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..guidance import random_cutouts
from ..guidance.cutouts import check_images, unit_range
from .quirks import Quirks


class MakeCutouts(nn.Module):
    """Cuts random squares out of pictures and averages them down to one size; see `guidance.random_cutouts`.

    Args:
        cut_size: The side of the results in pixels.
        cut_power: The exponent of the random sizes.
    """

    def __init__(self, cut_size: int, cut_power: float = 1.0) -> None:
        super().__init__()
        self.cut_size = cut_size
        self.cut_power = cut_power

    def forward(self, pixel_values: Tensor, num_cutouts: int) -> Tensor:
        """Returns cutouts of pictures.

        Args:
            pixel_values: Pictures of shape (B, C, H, W).
            num_cutouts: The number of cutouts of each picture.

        Returns:
            The cutouts, of shape (num_cutouts * B, C, cut_size, cut_size).
        """
        return random_cutouts(pixel_values, num_cutouts, self.cut_size, self.cut_power)


@dataclass(frozen=True)
class View:
    """What a guide sees of pictures.

    Attributes:
        size: The side of a cutout, or the shorter side of a whole picture, in pixels.
        num_cuts: The number of random cutouts; None for the whole picture.
        cut_power: The exponent of the random sizes of cutouts.
        quirks: `aliased_resize` is used.
    """

    size: int
    num_cuts: int | None
    cut_power: float
    quirks: Quirks

    def __call__(self, im_pix: Tensor) -> Tensor:
        """Returns pixels (N, 3, h, w) in [0, 1] of images (B, 3, H, W) in [-1, 1]."""
        pixels = unit_range(check_images(im_pix, "im_pix"))
        if self.num_cuts is not None:
            return random_cutouts(pixels, self.num_cuts, self.size, self.cut_power)
        return resize_shorter(pixels, self.size, not self.quirks.aliased_resize)


def resize_shorter(pixels: Tensor, size: int, antialias: bool) -> Tensor:
    """Resizes pictures (B, C, H, W) bilinearly, so that the shorter side has `size` pixels."""
    short = min(pixels.shape[-2:])
    if short == size:
        return pixels
    shape = [size if side == short else int(size * side / short) for side in pixels.shape[-2:]]
    return F.interpolate(pixels, shape, mode="bilinear", antialias=antialias, align_corners=False)


def shared_views(views: Sequence[View], im_pix: Tensor) -> list[Tensor]:
    """Returns what each guide sees. Guides with equal views see the same cutouts."""
    seen = {view: view(im_pix) for view in dict.fromkeys(views)}
    return [seen[view] for view in views]
