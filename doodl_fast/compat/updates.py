"""The latent update of the reference, where it differs from `LatentUpdate`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.networks import HALF_DTYPES
from ..optimization.update import LatentUpdate, UpdateSettings, norms
from .quirks import Quirks


class ReferenceUpdate(LatentUpdate):
    """A `LatentUpdate` that draws its perturbation from the global generator of the latents' device.

    Args:
        x: The first latents, of shape (B, C, ...).
        y: The second latents, of the same shape.
        settings: The settings of the update.
        quirks: Which peculiarities of the reference are reproduced. With `half_updates`, fp16 and bf16 latents are held
            and updated in their own dtype.
        inverted: Whether x and y come from the inversion of a picture. They then start as they are, even if they are
            tied; see `Quirks.averaged_inversion` for what happens at the first update.
        noise: Latents (B, C, ...) to whose norms x and y are renormalised; None for their own norms at the start.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        settings: UpdateSettings,
        quirks: Quirks,
        inverted: bool = False,
        noise: Tensor | None = None,
    ) -> None:
        average = settings.tied_latents and (quirks.averaged_inversion or not inverted)
        super().__init__(x, y, replace(settings, tied_latents=average), global_generator(x.device))
        self.shares_gradients = settings.tied_latents and not average
        dtype = x.dtype if quirks.half_updates else self.latents[0].dtype
        if inverted:
            self.latents = [x.detach().clone(), y.detach().clone()]
        self.latents, self.momenta = ([z.to(dtype) for z in pair] for pair in (self.latents, self.momenta))
        take = _rounded_norm if dtype in HALF_DTYPES else norms
        self.start_norms = [take(z if noise is None else noise) for z in self.latents]
        if average:  # Both are scaled to the same norm, even if they differ at the start.
            self.start_norms = [0.5 * (self.start_norms[0] + self.start_norms[1])] * 2

    def _descend(self, gradients: list[Tensor], noise: Tensor | None) -> None:
        """Does one update; with `half_updates` and latents in half precision, in their own dtype."""
        if self.shares_gradients:
            gradients = [torch.stack(gradients).mean(0)] * 2
        if self.latents[0].dtype in HALF_DTYPES:
            self._descend_rounded(gradients, noise)
        else:
            super()._descend(gradients, noise)

    def _descend_rounded(self, gradients: list[Tensor], noise: Tensor | None) -> None:
        """Does one update in the latents' dtype, with a rounding after every operation."""
        settings = self.settings
        gradients = [0.5 * settings.grad_scale * gradient for gradient in gradients]
        if settings.tied_latents:
            gradients = [torch.stack(gradients).mean(0)] * 2
        if settings.clip_grad_value is not None:
            gradients = [g.clamp(-settings.clip_grad_value, settings.clip_grad_value) for g in gradients]
        self.momenta = [settings.momentum * m + g for m, g in zip(self.momenta, gradients, strict=True)]
        moves = self.momenta
        if settings.nesterov:
            moves = [g + settings.momentum * m for m, g in zip(self.momenta, gradients, strict=True)]
        latents = [z - move for z, move in zip(self.latents, moves, strict=True)]
        if noise is not None:
            latents = [z + settings.perturbation_scale * noise for z in latents]
        if settings.tied_latents:
            latents = [0.5 * (latents[0] + latents[1])] * 2
        if settings.renormalize_latents:
            latents = [z * float(n) / float(_rounded_norm(z)) for z, n in zip(latents, self.start_norms, strict=True)]
        self.latents = latents


def global_generator(device: torch.device) -> torch.Generator:
    """Returns the generator that random functions use on a device if they are given none."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator: torch.Generator = torch.cuda.default_generators[index]
        return generator
    return torch.default_generator


def _rounded_norm(latents: Tensor) -> Tensor:
    """Returns the 2-norm of all entries, as a 0-dim tensor in the latents' dtype."""
    return latents.norm()
