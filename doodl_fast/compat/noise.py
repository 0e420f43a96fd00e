"""A layer's `predict_noise` as the engine's evaluator."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diffusion.networks import FLOAT_DTYPES, as_tensor, frozen
from .reversible import Values
from .schedule import get_alpha_and_beta

if TYPE_CHECKING:
    from .layers import SteppingLayer


class LayerNoise:
    """`layer.predict_noise(x, t, *extra)`, less what `clip_cond_fn` asks for. extra: what followed the pair."""

    def __init__(self, layer: SteppingLayer, extra: Values) -> None:
        self.layer, self.extra = layer, extra
        self.places = [place for place, value in enumerate(extra) if isinstance(value, Tensor)]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.extra[place] for place in self.places)

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        dtypes = (weight.dtype for weight in self.layer.parameters() if weight.dtype in FLOAT_DTYPES)
        return next(dtypes, latents_dtype)

    def running(self) -> contextlib.AbstractContextManager[None]:
        return frozen(self.layer)

    def __call__(
        self,
        x: Tensor,
        t: Any,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> Tensor:
        extra = list(self.extra)
        for place, tensor in zip(self.places, self.tensors() if tensors is None else tensors, strict=True):
            extra[place] = tensor
        timestep = torch.full((), t, dtype=torch.int64, device=x.device)
        predicted = self.layer.predict_noise(x.to(self.compute_dtype(x.dtype)), timestep, *extra)
        noise = as_tensor(predicted, "predict_noise")
        if noise.shape != x.shape:
            raise ValueError(f"predict_noise: expected a tensor of shape {tuple(x.shape)}, got {tuple(noise.shape)}")
        noise = noise.to(torch.promote_types(noise.dtype, x.dtype))
        if self.layer.clip_cond_fn is not None:
            beta = get_alpha_and_beta(t, self.layer.scheduler, self.layer.quirks)[1]
            latent = x.detach().to(latents_dtype or x.dtype)
            guidance = self.layer.clip_cond_fn(latent, timestep.reshape(1), scheduler=self.layer.scheduler)
            noise = noise - beta**0.5 * guidance.detach().to(noise.dtype)
        return noise.to(x.dtype)
