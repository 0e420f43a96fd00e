"""Sana: a flow with linear attention on latents of a 32-fold autoencoder (Xie et al., arXiv 2410.10629)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..decoder import vae_scale_factor
from .base import Request
from .masked import MaskedFamily, warn_unbinned
from .transformer import TransformerCall


class SanaCall(TransformerCall):
    """Calls Sana's transformer as `(x, t, cond, **kwargs)`, and drops the variance where it predicts one."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the network's prediction, (B, C, h, w) like x."""
        scale: float = self.module.config.timestep_scale  # type: ignore[union-attr, assignment]
        return super().__call__(x, t * scale, cond, **kwargs)[:, : x.shape[1]]


class Sana(MaskedFamily):
    """Sana, with classifier-free guidance. Sizes are used as they are: the resolution binning is not part of the chain.

    It takes `complex_human_instruction`, `clean_caption`, `sigmas` and `attention_kwargs` besides. The pipelines come
    with a DPM-Solver on a flow's noise levels, which `Sampler` follows; other solvers need FlowMatchEuler.
    """

    pipelines = ("SanaPipeline",)
    guidance_scale = 4.5
    takes_flows = True

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        super().check(pipe)
        if pipe.transformer.config.guidance_embeds:
            raise ValueError(
                "pipe: expected a transformer with guidance_embeds=False, got True (Sana Sprint's), which SanaPipeline "
                "itself cannot call"
            )

    def network(self, pipe: Any) -> SanaCall:
        """See `MaskedFamily.network`."""
        return SanaCall(pipe.transformer)

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """See `MaskedFamily.size`."""
        size = super().size(pipe, request)
        warn_unbinned(pipe, request, size, pipe.transformer.config.sample_size * vae_scale_factor(pipe.vae))
        return size
