"""Pictures as SigLIP 2 NaFlex reads them (arXiv 2502.14786): as many patches as their shape asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_SCALE, RESOLUTION = 100.0, 1e-5
"""What the model's own processor enlarges pictures by at most, and how exactly it finds the scale."""


@dataclass(frozen=True)
class Patches:
    """Makes patches of pictures, by operations that have a gradient.

    A picture keeps its shape, up to whole patches, and becomes as large as the number of patches allows.

    Attributes:
        side: The side of a patch in pixels.
        most: How many patches there are at most.
    """

    side: int
    most: int

    @classmethod
    def of(cls, model: Any, processor: Any) -> Patches | None:
        """What a model and its image processor say, or None for a model that reads squares of a fixed size."""
        config = model.config.vision_config
        if getattr(config, "image_size", None) is not None or getattr(config, "num_patches", None) is None:
            return None
        return cls(int(config.patch_size), int(getattr(processor, "max_num_patches", None) or config.num_patches))

    @property
    def square(self) -> int:
        """The side, in pixels, of the largest square picture."""
        return math.isqrt(self.most) * self.side

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """The height and the width, in pixels, to which a picture is resized.

        Both are rounded up to whole patches. The scale is found by bisection, as in the model's own processor, so that
        the result is the same where rounding decides.
        """

        def rounded(scale: float) -> tuple[int, int]:
            rows, columns = (max(1, math.ceil(length * scale / self.side)) for length in (height, width))
            return rows, columns

        low, high = RESOLUTION / 10, LARGEST_SCALE
        while high - low >= RESOLUTION:
            middle = (low + high) / 2
            rows, columns = rounded(middle)
            low, high = (middle, high) if rows * columns <= self.most else (low, middle)
        rows, columns = rounded(low)
        return rows * self.side, columns * self.side

    def resize(self, pixels: Tensor, mode: str) -> Tensor:
        """Resizes pictures (B, 3, H, W) with antialiasing."""
        sides = self.sides(*pixels.shape[-2:])
        if pixels.shape[-2:] == sides:
            return pixels
        return F.interpolate(pixels, sides, mode=mode, antialias=True, align_corners=False)

    def arguments(self, pixels: Tensor) -> dict[str, Tensor]:
        """What the model's `get_image_features` is called with for resized, normalised pictures (B, 3, h, w).

        All pictures of a batch have the same shape, so no patches are added to make them equal, and no mask is needed.
        """
        rows, columns = (length // self.side for length in pixels.shape[-2:])
        cut = pixels.unflatten(3, (columns, self.side)).unflatten(2, (rows, self.side))  # (B, 3, rows, s, columns, s)
        patches = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        # The model reads these numbers on the host, so they are not put where the pixels are.
        return {"pixel_values": patches, "spatial_shapes": torch.tensor([[rows, columns]]).expand(len(pixels), -1)}
