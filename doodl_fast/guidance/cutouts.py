"""Pictures in the sizes that guides look at: one resized square, or random square cutouts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def check_images(images: Any, name: str = "images") -> Tensor:
    """images as they are. Raises TypeError or ValueError unless they are floating and (B, 3, H, W)."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name}: expected a floating tensor in [-1, 1], got {got}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name}: expected shape (B, 3, height, width), got {tuple(images.shape)}")
    return images


def unit_range(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], clipped, in float32 at least: what a saved picture holds."""
    return (images.to(torch.promote_types(images.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)


def resize_and_crop(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """(B, C, size, size) of (B, C, H, W): the shorter side brought to `size` with antialiasing, then the centre."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    rows, columns = max(size, round(height * scale)), max(size, round(width * scale))
    resized = F.interpolate(images, (rows, columns), mode=mode, antialias=True, align_corners=False)
    top, left = (rows - size) // 2, (columns - size) // 2
    return resized[..., top : top + size, left : left + size]


def random_cutouts(images: Tensor, num: int, size: int, power: float = 1.0) -> Tensor:
    """(num * B, C, size, size): random squares of images (B, C, H, W), averaged down to `size`.

    The k-th B of them are one square of all pictures. A square's side is u^power of the way from `size` (or the
    shorter side, if that is smaller) to the shorter side, u uniform: a lower power prefers larger squares. u and the
    position are drawn from torch's global CPU generator, in the DOODL code's order (arXiv 2303.13703).

    Raises ValueError unless num and size are at least 1 and power is positive.
    """
    for name, value in (("num", num), ("size", size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    if not power > 0:
        raise ValueError(f"power: expected a positive number, got {power!r}")
    height, width = images.shape[-2:]
    largest = min(height, width)
    smallest = min(largest, size)
    squares = []
    for _ in range(num):
        side = int(torch.rand(()) ** power * (largest - smallest) + smallest)
        left = int(torch.randint(0, width - side + 1, ()))
        top = int(torch.randint(0, height - side + 1, ()))
        squares.append(F.adaptive_avg_pool2d(images[..., top : top + side, left : left + side], size))
    return torch.cat(squares)
