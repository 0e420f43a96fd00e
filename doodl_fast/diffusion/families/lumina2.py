"""Lumina-Image 2.0: a flow whose time runs from noise to picture, with guidance that keeps norms (arXiv 2503.21758)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calling import NetworkAdapter
from ..decoder import vae_scale_factor
from .base import Request
from .flux import TRAINING_STEPS
from .masked import MaskedFamily
from .transformer import TransformerCall, dynamic_shift, even_sigmas


class Lumina2Call(TransformerCall):
    """Calls Lumina's transformer as `(x, t, cond, **kwargs)`; it predicts the velocity from noise to picture.

    Args:
        module: The transformer.
        training_steps: How many timesteps the scheduler has.
    """

    def __init__(self, module: torch.nn.Module, training_steps: int = TRAINING_STEPS) -> None:
        super().__init__(module)
        self.training_steps = training_steps

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the velocity from picture to noise, (B, C, h, w) like x."""
        mask = kwargs["encoder_attention_mask"]
        if mask.is_meta:  # The network reads the prompts' lengths, which nobody knows there: they are the longest.
            kwargs["encoder_attention_mask"] = torch.ones(mask.shape, dtype=torch.long, device="cpu")
        return -super().__call__(x, 1 - t / self.training_steps, cond, **kwargs)


@dataclass(frozen=True)
class LuminaGuidance:
    """Classifier-free guidance as the pipeline has it.

    Attributes:
        keeps_norm: Whether every row of a picture keeps the norm of the prediction for the prompt.
        until: The prediction for the prompt is used alone from this timestep on; None is never.
    """

    keeps_norm: bool
    until: float | None

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float, t: Tensor) -> Tensor:
        """Combines predictions (B, C, h, w)."""
        guided = uncond + scale * (cond - uncond)
        if self.keeps_norm:
            guided = guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return guided if self.until is None else torch.where(t <= self.until, cond, guided)


class Lumina2(MaskedFamily):
    """Lumina-Image 2.0. It takes `system_prompt`, `cfg_normalization`, `cfg_trunc_ratio` and `sigmas` besides."""

    pipelines = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
    guidance_scale = 4.0
    takes_flows = True
    own_options = frozenset({"sigmas", "cfg_normalization", "cfg_trunc_ratio"})

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        # The pipeline takes the number of channels for that of patches, so its shift does not depend on the size.
        shift = dynamic_shift(pipe.scheduler, pipe.transformer.config.in_channels, 1.15)
        return {**shift, **even_sigmas(pipe.scheduler, request)}

    def network(self, pipe: Any) -> NetworkAdapter:
        """See `MaskedFamily.network`."""
        return Lumina2Call(pipe.transformer, pipe.scheduler.config.num_train_timesteps)

    def combine(self, pipe: Any, request: Request) -> LuminaGuidance:
        """See `MaskedFamily.combine`."""
        ratio, steps = request.options.get("cfg_trunc_ratio", 1.0), request.num_inference_steps
        cut = [i for i in range(steps) if (i + 1) / steps > ratio]
        until = None
        if cut:
            stepper = copy.deepcopy(pipe.scheduler)
            stepper.set_timesteps(steps, **self.set_timesteps(pipe, request))
            until = float(stepper.timesteps[cut[0]])
        return LuminaGuidance(bool(request.options.get("cfg_normalization", True)), until)

    def largest(self, pipe: Any) -> int:
        """See `MaskedFamily.largest`."""
        config = pipe.transformer.config
        return min(config.axes_lens[1:]) * config.patch_size * vae_scale_factor(pipe.vae)

    def most_tokens(self, pipe: Any) -> int:
        """See `MaskedFamily.most_tokens`."""
        return pipe.transformer.config.axes_lens[0] - 1
