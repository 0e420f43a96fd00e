"""AuraFlow: a flow whose prompts are embeddings with zeros in place of padding (cloneofsimo and the fal team, 2024)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..decoder import vae_scale_factor
from .base import Request
from .flux import TRAINING_STEPS
from .masked import MaskedFamily
from .transformer import TransformerCall


class AuraFlowCall(TransformerCall):
    """Calls AuraFlow's transformer as `(x, t, cond, **kwargs)`, with timesteps from 0 to 1."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the network's prediction, (B, C, h, w) like x."""
        return super().__call__(x, (t / TRAINING_STEPS).to(x.dtype), cond, **kwargs)


class AuraFlow(MaskedFamily):
    """AuraFlow, with classifier-free guidance. It takes `sigmas` and `attention_kwargs` besides."""

    pipelines = ("AuraFlowPipeline",)
    guidance_scale = 3.5
    takes_flows = True

    def network(self, pipe: Any) -> AuraFlowCall:
        """See `MaskedFamily.network`."""
        return AuraFlowCall(pipe.transformer)

    def conditions(self, pipe: Any, request: Request, size: tuple[int, int], encoded: Any) -> dict[str, Any]:
        """Returns nothing: the pipeline has multiplied the embeddings by their masks, and the network takes none."""
        return {}

    def largest(self, pipe: Any) -> int:
        """See `MaskedFamily.largest`."""
        config = pipe.transformer.config
        return math.isqrt(config.pos_embed_max_size) * config.patch_size * vae_scale_factor(pipe.vae)
