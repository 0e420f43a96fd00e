"""Diffusion of the pixels themselves, without a prompt: DDPM and DDIM with a `UNet2DModel` (arXiv 2006.11239)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..decoder import Decoder
from ..denoiser import Denoiser
from ..hooks import device_of
from ..images import check_images
from ..latent_space import LatentSpace, check_size
from .base import BY_HAND, DENOISER_OPTIONS, Family, Parts, Request, refuse_unknown, take


class Pixels(Decoder):
    """The decoder of a model whose latents are the pictures: they pass through, in float32 at least."""

    def __init__(self, channels: int = 3) -> None:
        self.channels = channels

    def leaner(self) -> None:
        """Returns None: there is nothing to save."""

    def __call__(self, latents: Tensor) -> Tensor:
        """Returns the latents (B, C, H, W) as images; one channel is repeated for red, green and blue.

        Raises:
            TypeError: `latents` is no floating-point tensor.
            ValueError: `latents` has another shape.
        """
        check_images(latents, "latents", self.channels)
        images = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return images.expand(-1, 3, -1, -1)

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Returns images (B, 3, H, W) as latents; there is no posterior to sample from.

        Raises:
            TypeError: `images` is no floating-point tensor.
            ValueError: `images` has another shape.
        """
        check_images(images)
        return images if self.channels == 3 else images.mean(1, keepdim=True)


class PixelSpace(Family):
    """DDPM and DDIM pipelines. There is no prompt and no guidance; `class_labels` reach a network that takes them."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    components = required = ("unet", "scheduler")
    guidance_scale = 1.0
    takes_text = False

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        config, name = pipe.unet.config, type(pipe).__name__
        if "cross_attention_dim" in config:
            raise TypeError(
                f"pipe: expected a UNet2DModel, or the pipeline that goes with a {type(pipe.unet).__name__}, got "
                f"{name} without vae, text_encoder; {BY_HAND}"
            )
        if config.in_channels not in (1, 3) or config.out_channels != config.in_channels:
            raise ValueError(
                f"pipe: expected a UNet from pictures of 1 or 3 channels to as many, got {config.in_channels} and "
                f"{config.out_channels}"
            )

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        given = {"prompt": request.prompt, "negative_prompt": request.negative_prompt or None}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: expected None, because {type(pipe).__name__} has no text, got {value!r}")
        if request.guidance_scale not in ("auto", 1.0):
            raise ValueError(
                f"guidance_scale: expected 1, because {type(pipe).__name__} has no guidance, got "
                f"{request.guidance_scale!r}"
            )
        options = dict(request.options)
        own, labels = take(options, DENOISER_OPTIONS), options.pop("class_labels", None)
        refuse_unknown(options, pipe, {"class_labels"})
        if labels is not None:
            labels = torch.as_tensor(labels, device=device_of(pipe.unet))
        config = pipe.unet.config
        sides = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
        halvings = 2 ** (len(config.block_out_channels) - 1)
        sizes = tuple(
            own if given is None else given for own, given in zip(sides, (request.height, request.width), strict=True)
        )
        for name, size in zip(("height", "width"), sizes, strict=True):
            check_size(name, size, 1, halvings)
        denoiser = Denoiser(pipe.unet, labels, **own)
        space = LatentSpace(
            config.in_channels,
            1,
            sizes[0],
            sizes[1],
            device_of(pipe.unet),
            prompts=1 if labels is None else len(labels),
            patch=halvings,
        )
        return Parts(denoiser, space, Pixels(config.in_channels))
