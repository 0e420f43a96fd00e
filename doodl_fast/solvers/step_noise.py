"""Draws the noise that steps of a sampler add."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_noise(count: int, x: Tensor, seed: int = 0, generator: torch.Generator | None = None) -> list[Tensor]:
    """Draws tensors of standard normal noise.

    Args:
        count: How many.
        x: The starting latents (B, C, ...), whose shape, dtype and device the noise gets.
        seed: Of the noise, unless there is a generator. It is drawn in float32 on the CPU, so that a seed means the
            same noise everywhere.
        generator: Where it is drawn from instead. In the state in which a pipeline would have it, it gives the
            pipeline's own noise.
    """
    source = torch.Generator().manual_seed(seed) if generator is None else generator
    dtype = torch.float32 if generator is None else x.dtype
    return [torch.randn(x.shape, generator=source, dtype=dtype, device=source.device).to(x) for _ in range(count)]
