"""Perturbed-attention guidance (Ahn et al., ECCV 2024, arXiv 2403.17377), and networks that are guided in three ways.

With PAG the network is called once more for the prompt, with the identity in place of some of its attention maps, and
the prediction is pushed away from what comes out: `eps + pag_scale * (eps_c - eps_perturbed)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..conditions import map_tensors
from ..module_copies import ModuleCopies, why_not_copied
from .additions import Addition, AroundUNet, Build, numbers
from .base import Request

PERTURBED = tuple(f"StableDiffusion{xl}PAG{kind}Pipeline" for xl in ("", "XL") for kind in ("", "Img2Img"))


class PAG(Addition):
    """Perturbed-attention guidance in the layers that the pipeline is set to (`pag_applied_layers`)."""

    pipelines = PERTURBED
    options = frozenset({"pag_scale", "pag_adaptive_scale"})

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        (self._scale,) = numbers("pag_scale", options.get("pag_scale", 3.0), 1)
        (self._falls,) = numbers("pag_adaptive_scale", options.get("pag_adaptive_scale", 0.0), 1)
        for name, value in (("pag_scale", self._scale), ("pag_adaptive_scale", self._falls)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value:g}")
        layers = pipe.pag_applied_layers
        self._layers = [layers] if isinstance(layers, str) else list(layers)

    def add(self, build: Build) -> None:
        """Makes a copy of the network, which shares its weights, with the pipeline's own attention processors."""
        if self._scale == 0 or not self._layers:
            return
        reason = why_not_copied(build.network)
        if reason is not None:
            raise ValueError(
                f"pag_scale: expected 0 because {reason}, so that no copy of the network with other attention layers "
                f"can be made, got {self._scale:g}"
            )
        copies = ModuleCopies(build.network)
        unet = copies.of(build.unet)
        processor = build.pipe._pag_attn_processors[0 if build.guided else 1]
        for layer in self._layers:
            _set_processor(unet, layer, processor)
        build.has_own_guidance = True
        build.network = PerturbedUNet(copies.of(build.network), self._scale, self._falls, build.guided)


def _set_processor(unet: Any, layer: str, processor: Any) -> None:
    """Gives the self-attention layers of a name the processor.

    Args:
        unet: The copy of the UNet.
        layer: A regular expression that is found in the names of the layers. As in diffusers, a layer whose last number
            is that of the name is left out.
        processor: The attention processor.

    Raises:
        ValueError: There is no such layer.
    """
    ending = layer.rsplit(".", 1)[-1]
    found = [
        module
        for name, module in unet.named_modules()
        if getattr(module, "is_cross_attention", True) is False
        and re.search(layer, name)
        and not (ending.isnumeric() and name.rsplit(".", 1)[-1] == ending)
    ]
    if not found:
        raise ValueError(f"pag_applied_layers: expected the name of a self-attention layer, got {layer!r}")
    for module in found:
        module.processor = processor


class PerturbedUNet(AroundUNet):
    """A UNet whose prediction is pushed away from that of its perturbed attention.

    The UNet is called on the rows [uncond; cond; cond], or [cond; cond] without guidance, of which its attention
    processors perturb the last ones. What is added is added to both halves of the result, so that classifier-free
    guidance, which combines them, adds it once.

    Args:
        unet: The UNet with the attention processors.
        scale: The weight of what is added.
        falls: By how much the weight falls for each timestep below 1000; 0 is a constant weight.
        guided: Whether the rows are [uncond; cond].
    """

    def __init__(self, unet: Any, scale: float, falls: float, guided: bool) -> None:
        super().__init__(unet)
        self.scale, self.falls, self.guided = scale, falls, guided

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        """Returns the UNet's prediction.

        Args:
            sample: Latents (B, C, h, w).
            timestep: A 0-dim tensor.
            encoder_hidden_states: The prompts' embeddings, (B, tokens, features).
            **kwargs: Further arguments of the UNet.
        """
        kwargs.pop("return_dict", None)
        more = map_tensors(kwargs, lambda leaf, _name: self._with_cond_again(leaf))
        found = self.predict(
            self._with_cond_again(sample), timestep, self._with_cond_again(encoder_hidden_states), **more
        )
        *halves, cond, perturbed = found.chunk(3 if self.guided else 2)
        weight: Any = self.scale
        if self.falls > 0:
            weight = (self.scale - self.falls * (1000 - timestep)).clamp(min=0)
        added = weight * (cond - perturbed)
        return (torch.cat([half + added for half in (*halves, cond)]),)

    def _with_cond_again(self, rows: Tensor) -> Tensor:
        """Returns the rows with those for the prompt a second time."""
        if rows.ndim == 0:
            return rows
        return torch.cat([rows, rows.chunk(2)[1] if self.guided else rows])
