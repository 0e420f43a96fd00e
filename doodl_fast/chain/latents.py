"""What a chain requires of the latents that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .host_reads import check_later
from .transforms import is_wrapped

LATENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_latents(x: Tensor, y: Tensor | None) -> None:
    """Checks that x, and y unless it is None, are finite floating-point tensors (B, C, ...) that match each other.

    Raises:
        TypeError: A latent is no tensor, or is not of fp16, bf16, fp32 or fp64.
        ValueError: A latent has fewer than two dimensions or a value that is not finite, or y differs from x in shape,
            dtype or device.
    """
    check_all({"x": x} if y is None else {"x": x, "y": y})


def check_all(latents: Mapping[str, Tensor]) -> None:
    """Checks that latents are finite floating-point tensors (B, C, ...) that match the first of them.

    Args:
        latents: The latents by the names that errors give them; the first is x.

    Raises:
        TypeError: A latent is no tensor, or is not of fp16, bf16, fp32 or fp64.
        ValueError: A latent has fewer than two dimensions or a value that is not finite, or differs from the first one
            in shape, dtype or device.
    """
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
    (first, x), *others = latents.items()
    for name, latent in others:
        for what in ("shape", "dtype", "device"):
            expected, got = getattr(x, what), getattr(latent, what)
            if expected != got:
                fix = f"use {name}.to({first}.{what})"
                if what == "shape":
                    fix = "y=None starts from y = x" if name == "y" else f"use a tensor of {first}'s shape"
                raise ValueError(f"{name}: expected {first}'s {what} {_plain(expected)}, got {_plain(got)}; {fix}")
    if any(map(is_wrapped, latents.values())):  # Their values cannot be read.
        return
    # All latents are checked in one synchronisation.
    finite = torch.stack([torch.isfinite(latent.detach()).all() for latent in latents.values()])
    names = list(latents)

    def check(flags: list[float]) -> None:
        for name, good in zip(names, flags, strict=True):
            if not good:
                raise ValueError(
                    f"{name}: expected finite latents, got NaN or Inf; check the image, noise or update that made them"
                )

    check_later(finite, check)


def _plain(value: Any) -> Any:
    """A shape prints as a plain tuple."""
    return tuple(value) if isinstance(value, torch.Size) else value
