"""DiT: diffusion with a transformer that takes class labels instead of prompts (Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..calling import NetworkAdapter
from ..decoder import Decoder, vae_scale_factor
from ..denoiser import Denoiser
from ..hooks import device_of
from .base import DENOISER_OPTIONS, Family, Parts, Request, refuse_unknown, take
from .transformer import transformer_space


class DiTCall(NetworkAdapter):
    """Calls DiT's transformer as `(x, t, labels)`, and drops the variance that it predicts besides."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        """Returns the predicted noise, (B, C, h, w) like x."""
        output: Tensor = self.module(x, timestep=t.expand(len(x)), class_labels=cond, return_dict=False, **kwargs)[0]
        return output[:, : x.shape[1]]


class DiT(Family):
    """DiT, guided classifier-free by `class_labels`: a number, or one for each picture."""

    pipelines = ("DiTPipeline",)
    components = ("transformer", "vae", "scheduler")
    guidance_scale = 4.0
    takes_text = False

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe, ("transformer", "vae", "scheduler"))

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        for name, value in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or None)):
            if value is not None:
                raise ValueError(f"{name}: expected None, because DiTPipeline has no text, got {value!r}")
        config, scale, options = pipe.transformer.config, self.scale_of(request), dict(request.options)
        own = take(options, DENOISER_OPTIONS)
        labels = _labels(options.pop("class_labels", None), config.num_embeds_ada_norm, device_of(pipe.transformer))
        refuse_unknown(options, pipe, {"class_labels"})
        side = config.sample_size * vae_scale_factor(pipe.vae)
        size = tuple(side if given is None else given for given in (request.height, request.width))
        space = transformer_space(
            pipe,
            (size[0], size[1]),
            config.in_channels,
            config.patch_size,
            prompts=len(labels),
            fixed_by="the pipeline makes",
        )
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels != side:
                raise ValueError(f"{name}: expected {side}, the size that DiTPipeline makes, got {pixels}")
        none = torch.full_like(labels, config.num_embeds_ada_norm)
        guided = scale > 1
        denoiser = Denoiser(
            DiTCall(pipe.transformer), labels, none if guided else None, scale if guided else 1.0, **own
        )
        return Parts(denoiser, space, Decoder(pipe.vae))


def _labels(labels: Any, classes: int, device: torch.device) -> Tensor:
    """Returns class labels as a tensor (B,).

    Raises:
        TypeError: They are neither a whole number nor several.
        ValueError: There are none, or one is out of range.
    """
    given = labels.tolist() if isinstance(labels, Tensor) else labels
    numbers = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise TypeError(f"class_labels: expected a whole number or a list of them, got {labels!r}")
    if not numbers or not all(0 <= number < classes for number in numbers):
        raise ValueError(f"class_labels: expected numbers from 0 to {classes - 1}, got {labels!r}")
    return torch.tensor(numbers, device=device)
