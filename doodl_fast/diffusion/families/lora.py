"""The weight of LoRA adapters that a call of the pipeline asks for (Hu et al., ICLR 2022, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..module_copies import ModuleCopies, why_not_copied
from ..networks import scalable_layers
from .additions import Addition, Build
from .base import Request, components_of

KWARGS = "cross_attention_kwargs"


class LoRAScale(Addition):
    """`cross_attention_kwargs={"scale": ...}` for a UNet with LoRA adapters.

    diffusers multiplies the adapters' scales for the length of each call of the UNet, and divides them afterwards. A
    chain's network is a copy instead that has the scales and shares the weights: so threads do not disturb each other,
    and blocks that are computed again for a gradient have the same scales. Where no copy can be made, the argument is
    passed on.
    """

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        given = request.options.get(KWARGS)
        self._scale = given.get("scale") if isinstance(given, Mapping) else None

    @classmethod
    def is_in(cls, pipe: Any) -> bool:
        """Whether the UNet has LoRA adapters."""
        return bool(scalable_layers(components_of(pipe).get("unet")))

    def add(self, build: Build) -> None:
        """Makes the copy."""
        if self._scale in (None, 1) or why_not_copied(build.unet) is not None:
            return
        copied = ModuleCopies(build.unet).of(build.unet)
        for layer in scalable_layers(copied):
            layer.scaling = dict(layer.scaling)
            layer.scale_layer(self._scale)
        build.network = build.unet = copied
        build.kwargs[KWARGS] = {name: value for name, value in build.kwargs[KWARGS].items() if name != "scale"}
