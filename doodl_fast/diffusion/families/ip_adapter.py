"""IP-Adapter (Ye et al., arXiv 2308.06721): a picture as a prompt, by attention layers of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..guided import Guided
from ..hooks import device_of
from .additions import Addition, Build
from .base import Request, components_of

PICTURE, EMBEDS = "ip_adapter_image", "ip_adapter_image_embeds"


class IPAdapter(Addition):
    """One or several IP-Adapters that are loaded into the UNet.

    Embeddings that are given keep their graph, so that they get gradients if they require grad.
    """

    options = frozenset({PICTURE, EMBEDS})

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        self._picture, self._embeds = options.get(PICTURE), options.get(EMBEDS)
        given = request.options.get("added_cond_kwargs") or {}
        self._is_given = "image_embeds" in given
        chosen = [self._picture is not None, self._embeds is not None, self._is_given]
        if sum(chosen) != 1:
            raise ValueError(
                f"{PICTURE}: the pipeline's UNet has an IP-Adapter, so expected one of {PICTURE}, {EMBEDS} and "
                f"added_cond_kwargs={{'image_embeds': [...]}}, got {'none' if not any(chosen) else 'several'}; "
                "pipe.unload_ip_adapter() removes the adapter"
            )
        pictures = self._picture if isinstance(self._picture, (list, tuple)) else [self._picture]
        if any(isinstance(picture, Tensor) and picture.requires_grad for picture in pictures):
            raise ValueError(
                f"{PICTURE}: expected pictures that do not require grad, because they are encoded once and without "
                f"gradient; pass {EMBEDS} that require grad instead"
            )
        if self._picture is not None and getattr(pipe, "image_encoder", None) is None:
            raise ValueError(f"{PICTURE}: {type(pipe).__name__} has no image_encoder; pass {EMBEDS} instead")
        count = len(pipe.unet.encoder_hid_proj.image_projection_layers) if not self._is_given else 0
        if self._embeds is not None and not (isinstance(self._embeds, (list, tuple)) and len(self._embeds) == count):
            raise ValueError(f"{EMBEDS}: expected a list of {count} tensors, one for each IP-Adapter")

    @classmethod
    def is_in(cls, pipe: Any) -> bool:
        """Whether the UNet has an IP-Adapter."""
        unet: Any = components_of(pipe).get("unet")
        config = getattr(getattr(unet, "_orig_mod", unet), "config", None)
        return getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj"

    def add(self, build: Build) -> None:
        """Adds the embeddings of the pictures to the arguments of the UNet."""
        if self._is_given:
            return
        pipe, guided = build.pipe, build.guided
        with torch.set_grad_enabled(self._embeds is not None and torch.is_grad_enabled()):
            embeds = pipe.prepare_ip_adapter_image_embeds(self._picture, self._embeds, device_of(pipe.unet), 1, guided)
        pairs: list[Any] = list(embeds)
        if guided:
            for number, embed in enumerate(embeds):
                if len(embed) % 2:
                    raise ValueError(
                        f"{EMBEDS}[{number}]: expected the embeddings without and with the picture one after the other "
                        f"because guidance_scale is above 1, so an even number of rows, got {len(embed)}"
                    )
            pairs = [Guided(*embed.chunk(2)) for embed in embeds]
        added = dict(build.kwargs.get("added_cond_kwargs") or {})
        build.kwargs["added_cond_kwargs"] = {**added, "image_embeds": pairs}
