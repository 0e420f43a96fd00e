"""What a chain requires of the latents that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .transforms import is_wrapped

LATENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_latents(x: Tensor, y: Tensor | None) -> None:
    """Checks that x, and y unless it is None, are finite floating-point tensors (B, C, ...) that match each other.

    Raises:
        TypeError: A latent is no tensor, or is not of fp16, bf16, fp32 or fp64.
        ValueError: A latent has fewer than two dimensions or a value that is not finite, or y differs from x in shape,
            dtype or device.
    """
    latents = {"x": x} if y is None else {"x": x, "y": y}
    for name, latent in latents.items():
        if not isinstance(latent, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(latent).__name__}")
        if latent.dtype not in LATENT_DTYPES:
            raise TypeError(
                f"{name}: expected a tensor of fp16, bf16, fp32 or fp64, got {latent.dtype}; convert it with .float()"
            )
        if latent.ndim < 2:
            raise ValueError(
                f"{name}: expected shape (B, C, ...), got {tuple(latent.shape)}; add a batch dimension, {name}[None]"
            )
    if y is not None:
        for what in ("shape", "dtype", "device"):
            expected, got = getattr(x, what), getattr(y, what)
            if expected != got:
                fix = "y=None starts from y = x" if what == "shape" else f"use y.to(x.{what})"
                raise ValueError(f"y: expected x's {what} {_plain(expected)}, got {_plain(got)}; {fix}")
    if any(map(is_wrapped, latents.values())):  # Their values cannot be read.
        return
    # Both latents are checked in one synchronisation.
    finite = torch.stack([torch.isfinite(latent.detach()).all() for latent in latents.values()]).tolist()
    for name, good in zip(latents, finite, strict=True):
        if not good:
            raise ValueError(
                f"{name}: expected finite latents, got NaN or Inf; check the image, noise or update that made them"
            )


def _plain(value: Any) -> Any:
    """A shape prints as a plain tuple."""
    return tuple(value) if isinstance(value, torch.Size) else value
