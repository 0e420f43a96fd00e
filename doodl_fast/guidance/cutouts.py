"""Pictures in the sizes that guides look at: one resized square, or random square cutouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.images import video_hint
from .arguments import check_count, check_positive


def check_images(images: Any, name: str = "images") -> Tensor:
    """Returns images as they are.

    Raises:
        TypeError: They are no floating tensor.
        ValueError: They do not have the shape (B, 3, H, W).
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name}: expected a floating tensor in [-1, 1], got {got}")
    if images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape)
        raise ValueError(f"{name}: expected shape (B, 3, height, width), got {shape}{video_hint(images)}")
    return images


def unit_range(images: Tensor) -> Tensor:
    """Returns images in [-1, 1] as a saved picture holds them: in [0, 1], clipped, in float32 at least."""
    return (images.to(torch.promote_types(images.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtracts a mean from each color channel of pixels (B, 3, H, W), and divides by a deviation."""
    shift, scale = (pixels.new_tensor(values).reshape(1, 3, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale


def resize_and_crop(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Resizes the shorter side of images to `size` with antialiasing, and crops the center.

    Args:
        images: A tensor (B, C, H, W).
        size: The side of the result in pixels.
        mode: The interpolation, "bicubic" or "bilinear".

    Returns:
        A tensor (B, C, size, size).
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    rows, columns = max(size, round(height * scale)), max(size, round(width * scale))
    resized = F.interpolate(images, (rows, columns), mode=mode, antialias=True, align_corners=False)
    top, left = (rows - size) // 2, (columns - size) // 2
    return resized[..., top : top + size, left : left + size]


def resize_to_square(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Resizes images (B, C, H, W) to (B, C, size, size) with antialiasing, whatever their shape."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode=mode, antialias=True, align_corners=False)


def resize_and_pad(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Resizes the longer side of images (B, C, H, W) to `size` with antialiasing, and adds zeros to the shorter one."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    resized = F.interpolate(images, (rows, columns), mode=mode, antialias=True, align_corners=False)
    top, left = (size - rows) // 2, (size - columns) // 2
    return F.pad(resized, (left, size - columns - left, top, size - rows - top))


FITS = {"crop": resize_and_crop, "squeeze": resize_to_square, "pad": resize_and_pad}
"""The ways in which pictures of any shape become squares, by name."""


def random_cutouts(images: Tensor, num: int, size: int, power: float = 1.0) -> Tensor:
    """Cuts random squares out of images, and averages each of them down to `size`.

    The side of a square is u^power of the way from `size` (or the shorter side of the images, if that is smaller) to
    the shorter side, where u is uniform, so a lower power prefers larger squares. u and the position are drawn from
    torch's global CPU generator, in the order of the DOODL code (arXiv 2303.13703).

    Args:
        images: A tensor (B, C, H, W).
        num: The number of squares.
        size: The side of the result in pixels.
        power: How the sides are distributed, a positive number.

    Returns:
        A tensor (num * B, C, size, size), where the k-th B entries are one square of all images.

    Raises:
        ValueError: An argument is out of range.
    """
    check_count(num, "num", 1)
    check_count(size, "size", 1)
    check_positive(power, "power")
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
