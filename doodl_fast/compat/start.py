"""What a run of `gen` starts from: seeds, noise, and the latents of a source picture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.hooks import device_of
from ..diffusion.images import eight_bits, read_upright
from ..diffusion.pipeline import Decoder
from .quirks import Quirks


def initial_noise(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns standard normal latents, which are drawn on their device and in their dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def seed_everything(seed: int) -> None:
    """Seeds PyTorch's global generators on all devices, and Python's."""
    torch.manual_seed(seed)
    random.seed(seed)


def encode_source(source: Any, size: int, decoder: Decoder, dtype: torch.dtype, quirks: Quirks) -> Tensor:
    """Returns latents (1, C, h, w) of a picture, sampled from the VAE's posterior with the global generator.

    Args:
        source: A picture file or a PIL picture.
        size: The side of the picture in pixels.
        decoder: The decoder, whose VAE encodes the picture.
        dtype: The dtype of the pixels and the latents.
        quirks: Which peculiarities of the reference are reproduced.
    """
    pixels = source_pixels(source, size, quirks).to(device_of(decoder.vae), dtype)
    return decoder.encode(pixels, sample=True)


def source_pixels(source: Any, size: int, quirks: Quirks) -> Tensor:
    """Returns the pixels of a picture's central square, of shape (1, 3, size, size), float64, in [-1, 1].

    Args:
        source: A picture file, which is turned upright as its metadata say, or a PIL picture. Other modes than RGB and
            RGBA are converted to them.
        size: The side of the result in pixels.
        quirks: `signed_alpha` is used where transparent pictures are composed with white.

    Raises:
        ValueError: The file is missing or no picture.
        TypeError: The source is neither a file nor a PIL picture.
    """
    import numpy as np
    from PIL import Image

    if isinstance(source, (str, Path)):
        source = read_upright(source, "source_im")
    if not isinstance(source, Image.Image):
        raise TypeError(f"source_im: expected a file or a PIL picture, got {type(source).__name__}")
    source = eight_bits(source, "source_im")
    if source.mode not in ("RGB", "RGBA"):
        source = source.convert("RGBA" if source.has_transparency_data else "RGB")
    width, height = source.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    square = source.crop((left, top, left + side, top + side)).resize((size, size))
    pixels = torch.from_numpy(np.asarray(square) / 255 * 2 - 1).permute(2, 0, 1)[None]
    return composed_with_white(pixels, quirks)


def composed_with_white(pixels: Tensor, quirks: Quirks) -> Tensor:
    """Returns pixels (1, 3, H, W) of pixels (1, 3 or 4, H, W) in [-1, 1], whose fourth channel is the opacity.

    Args:
        pixels: The pixels.
        quirks: `signed_alpha` is used.
    """
    if pixels.shape[1] == 3:
        return pixels
    colour, alpha = pixels[:, :3], pixels[:, 3:]
    if not quirks.signed_alpha:
        alpha = (alpha + 1) / 2
    return colour * alpha + (1 - alpha)
