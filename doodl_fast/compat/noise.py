"""The noise that a layer's `predict_noise` predicts, in the form in which a chain asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..chain.evaluator import Evaluator
from ..diffusion.networks import FLOAT_DTYPES, as_tensor, frozen
from .quirks import Quirks
from .reversible import ReversibleLayer, Values
from .schedule import get_alpha_and_beta


class NoiseLayer(ReversibleLayer):
    """A layer that predicts the noise in a latent by its method `predict_noise`.

    Attributes:
        scheduler: The scheduler whose timesteps the layer is called at.
        clip_cond_fn: A function `(latent, t, scheduler=) -> gradient`, or None. `sqrt(1 - alpha)` times the gradient is
            subtracted from the predicted noise.
        quirks: Which peculiarities of the reference are reproduced.
    """

    scheduler: Any
    clip_cond_fn: Callable[..., Tensor] | None
    quirks: Quirks

    def predict_noise(self, latent: Tensor, t: Tensor, *extra: Any) -> Tensor:
        """Returns the noise in `latent`, in its shape."""
        raise NotImplementedError


class LayerNoise(Evaluator):
    """An evaluator that calls `layer.predict_noise(x, t, *extra)` and subtracts what `clip_cond_fn` asks for.

    Args:
        layer: The layer. Its weights are treated as constants.
        extra: What the layer was given after the pair of latents. The tensors among it can be differentiated.
    """

    def __init__(self, layer: NoiseLayer, extra: Values) -> None:
        self.layer, self.extra = layer, extra
        self.places = [place for place, value in enumerate(extra) if isinstance(value, Tensor)]

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among the further inputs."""
        return tuple(self.extra[place] for place in self.places)

    def weights(self) -> tuple[tuple[str, Tensor], ...]:
        """The names and tensors of all parameters and buffers of the layer."""
        return (*self.layer.named_parameters(), *self.layer.named_buffers())

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the layer's first floating weight, or that of the latents where there is none."""
        dtypes = (weight.dtype for weight in self.layer.parameters() if weight.dtype in FLOAT_DTYPES)
        return next(dtypes, latents_dtype)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """The context of a run, in which the layer's weights do not require grad."""
        return frozen(self.layer)

    def __call__(
        self,
        x: Tensor,
        t: Any,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Returns the noise in x at timestep t, in the shape and dtype of x.

        Args:
            x: The latents, of shape (B, C, ...).
            t: The timestep.
            tensors: What is used instead of `tensors()`.
            latents_dtype: The dtype in which `clip_cond_fn` is given the latents; that of x by default.
        """
        extra = list(self.extra)
        for place, tensor in zip(self.places, self.tensors() if tensors is None else tensors, strict=True):
            extra[place] = tensor
        timestep = torch.full((), t, dtype=torch.int64, device=x.device)
        predicted = self.layer.predict_noise(x.to(self.compute_dtype(x.dtype), copy=True), timestep, *extra)
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
