"""InstructPix2Pix (Brooks et al., CVPR 2023, arXiv 2211.09800): a picture is edited by an instruction.

The guidance has two scales: `eps_u + guidance_scale * (eps_text - eps_image) + image_guidance_scale * (eps_image -
eps_u)`, where eps_image sees the picture without the instruction, and eps_u neither of the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..conditions import map_tensors
from ..guided import Guided
from .additions import Addition, AroundUNet, Build, numbers
from .base import Request
from .image_to_image import prepared

INSTRUCTED = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")


class InstructPix2Pix(Addition):
    """A UNet that sees the picture that is edited, and guidance by the instruction and by the picture."""

    pipelines = INSTRUCTED
    options = frozenset({"image", "image_guidance_scale"})
    sees_more = True

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        if options.get("image") is None:
            raise TypeError("image: expected the picture that is edited, got None")
        own = inspect.signature(type(pipe).__call__).parameters["image_guidance_scale"].default
        (self._scale,) = numbers("image_guidance_scale", options.get("image_guidance_scale", own), 1)
        if self._scale < 1:
            raise ValueError(
                f"image_guidance_scale: expected a number of at least 1, got {self._scale:g}, below which the pipeline "
                "does not guide at all; use guidance_scale=1 for that"
            )
        self._image = prepared(pipe, options["image"], request.height, request.width)
        self._factor = 1 if self._image.shape[1] == 3 else pipe.vae_scale_factor

    def size(self) -> tuple[int | None, int | None]:
        """Returns the size of the picture."""
        return self._image.shape[-2] * self._factor, self._image.shape[-1] * self._factor

    def add(self, build: Build) -> None:
        """Shows the UNet the picture."""
        shown = self._image.to(build.space.device)
        if shown.shape[1] == 3:
            shown = build.decoder.encode(shown)
            if not getattr(build.pipe, "is_cosxl_edit", False):  # These networks see what the VAE itself has.
                shown = build.decoder.raw(shown)
        build.has_own_guidance = True
        build.network = InstructedUNet(build.network, self._scale, build.guided)
        build.kwargs["shown"] = Guided(shown, shown)


class InstructedUNet(AroundUNet):
    """A UNet that sees a picture beside the latents, and is guided by it.

    With guidance it is called on the rows [prompt and picture; picture; neither]. It returns two halves, of which
    classifier-free guidance makes the sum with two scales.

    Args:
        unet: The UNet.
        scale: The weight of the picture.
        guided: Whether the rows that it is given are [uncond; cond].
    """

    def __init__(self, unet: Any, scale: float, guided: bool) -> None:
        super().__init__(unet)
        self.scale, self.guided = scale, guided

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, shown: Tensor, **kwargs: Any
    ) -> tuple[Tensor]:
        """Returns the UNet's prediction.

        Args:
            sample: Latents (B, C, h, w).
            timestep: A 0-dim tensor.
            encoder_hidden_states: The prompts' embeddings, (B, tokens, features).
            shown: The picture's latents, (B, C, h, w).
            **kwargs: Further arguments of the UNet.
        """
        if not self.guided:
            return (self.predict(torch.cat([sample, shown], dim=1), timestep, encoder_hidden_states, **kwargs),)
        more = map_tensors(kwargs, lambda leaf, _name: _three(leaf))
        picture = shown.chunk(2)[1]
        seen = torch.cat([picture, picture, torch.zeros_like(picture)])
        found = self.predict(torch.cat([_three(sample), seen], dim=1), timestep, _three(encoder_hidden_states), **more)
        by_both, by_picture, by_none = found.chunk(3)
        uncond = by_none + self.scale * (by_picture - by_none)
        return (torch.cat([uncond, uncond + (by_both - by_picture)]),)


def _three(rows: Tensor) -> Tensor:
    """Returns [cond; uncond; uncond] of [uncond; cond]."""
    if rows.ndim == 0:
        return rows
    uncond, cond = rows.chunk(2)
    return torch.cat([cond, uncond, uncond])


class OldEncoding:
    """A pipeline with an `encode_prompt`, made of the `_encode_prompt` that some classes of diffusers have instead.

    Args:
        pipe: The pipeline, all other attributes of which are passed on.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def encode_prompt(
        self,
        prompt: Any,
        device: Any,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the prompts' embeddings, and those of the negative prompts or None."""
        found: Tensor = self._pipe._encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        if not do_classifier_free_guidance:
            return found, None
        cond, uncond, _ = found.chunk(3)
        return cond, uncond
