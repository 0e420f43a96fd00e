"""Chroma: a flow with FLUX's transformer, pruned, and classifier-free guidance of masked prompts (lodestones, 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calling import NetworkAdapter
from ..decoder import vae_scale_factor
from .base import Request
from .encoding import NAMES
from .flux import PATCH, TRAINING_STEPS, image_places, pack, unpack
from .masked import MaskedFamily
from .transformer import dynamic_shift, even_sigmas, refuse_ip_adapter


class ChromaCall(NetworkAdapter):
    """Calls Chroma's transformer as `(x, t, cond, **kwargs)` on latents that are not packed."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        """Returns the network's prediction, (B, C, h, w) like x. `encoder_attention_mask` is the prompts' mask."""
        height, width = x.shape[-2:]
        patches, mask = pack(x), kwargs.pop("encoder_attention_mask")
        output = self.module(
            hidden_states=patches,
            timestep=t.expand(len(x)).to(x.dtype) / TRAINING_STEPS,
            encoder_hidden_states=cond,
            txt_ids=torch.zeros(cond.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=image_places(x),
            attention_mask=torch.cat([mask, mask.new_ones(patches.shape[:2])], dim=1),
            return_dict=False,
            **kwargs,
        )[0]
        return unpack(output, height, width)


class Chroma(MaskedFamily):
    """Chroma, with classifier-free guidance. It takes `sigmas` and `joint_attention_kwargs` besides."""

    pipelines = ("ChromaPipeline",)
    components = (*MaskedFamily.components, "image_encoder", "feature_extractor")
    guidance_scale = 5.0
    takes_flows = True
    network_options = frozenset({"joint_attention_kwargs"})
    returned = (*NAMES[:1], "text_ids", *NAMES[1:3], "negative_text_ids", *NAMES[3:])

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        super().check(pipe)
        refuse_ip_adapter(pipe, getattr(pipe.transformer, "encoder_hid_proj", None) is not None)

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        height, width = self.size(pipe, request)
        pixels = vae_scale_factor(pipe.vae) * PATCH
        shift = dynamic_shift(pipe.scheduler, (height // pixels) * (width // pixels), 1.15)
        return {**shift, **even_sigmas(pipe.scheduler, request)}

    def network(self, pipe: Any) -> ChromaCall:
        """See `MaskedFamily.network`."""
        return ChromaCall(pipe.transformer)

    def latents(self, pipe: Any) -> tuple[int, int]:
        """See `MaskedFamily.latents`."""
        return pipe.transformer.config.in_channels // PATCH**2, PATCH

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """See `MaskedFamily.size`."""
        own = pipe.default_sample_size * vae_scale_factor(pipe.vae)
        return own if request.height is None else request.height, own if request.width is None else request.width

    def fixed_by(self, pipe: Any) -> str | None:
        """See `MaskedFamily.fixed_by`."""
        is_dynamic = bool(pipe.scheduler.config.get("use_dynamic_shifting"))
        return "this chain's schedule is for (use_dynamic_shifting)" if is_dynamic else None
