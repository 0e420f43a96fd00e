"""Chains that start from a picture (SDEdit: Meng et al., ICLR 2022, arXiv 2108.01073), and parts of a chain."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..decoder import Decoder, latent_channels
from ..latent_space import LatentSpace, checked_seeds
from ..span import Span
from .additions import Addition, Build
from .base import Request

IMAGE_TO_IMAGE = tuple(
    f"StableDiffusion{xl}{kind}Img2ImgPipeline" for xl in ("", "XL") for kind in ("", "ControlNet", "PAG")
)
PARTS = frozenset({"denoising_start", "denoising_end"})


@dataclass(frozen=True)
class FromPicture(LatentSpace):
    """The latents of a chain that starts from a picture.

    Attributes:
        image: The picture in [-1, 1], (1 or B, 3, H, W), or its latents, (1 or B, C, h, w), which keep their graph.
        encoder: The VAE; it is None for latents.
        start: The shares of picture and noise; None is the picture without noise.
        draws_first: Whether the pipeline draws from the VAE's posterior before the noise where this does not, because
            there is no encoder. The draw is made and left unused, so that the noise is the pipeline's.
    """

    image: Tensor | None = None
    encoder: Decoder | None = None
    start: tuple[float, float] | None = None
    draws_first: bool = False

    def noise(
        self,
        seed: int | Sequence[int] = 0,
        batch: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        num_frames: int | None = None,
    ) -> Tensor:
        """Encodes the picture and adds noise, both drawn in the order in which the pipeline draws them."""
        assert self.image is not None
        source = generator
        if source is None:
            if isinstance(seed, (list, tuple)):
                raise ValueError(f"seed: expected an int, of what is drawn for all pictures together, got {seed!r}")
            source = torch.Generator().manual_seed(*checked_seeds(seed))
        rows = len(self.image)
        batch = max(rows, self.prompts) if batch is None else batch
        if isinstance(batch, int) and batch % rows:
            raise ValueError(f"batch: expected a multiple of {rows}, the number of pictures, got {batch}")
        target = self.device if device is None else torch.device(device)
        picture = self.image
        if self.encoder is not None and target.type != "meta":
            picture = self.encoder.encode(picture, generator=source)
        elif self.draws_first:
            torch.randn(picture.shape, generator=source, device=source.device)
        noise = super().noise(seed, batch, height, width, source, device, dtype, num_frames)
        if target.type == "meta":
            return noise
        picture = picture.to(noise).repeat(batch // rows, 1, 1, 1)
        if self.start is None:
            return picture
        return self.start[0] * picture + self.start[1] * noise


def from_picture(
    space: LatentSpace, image: Tensor, decoder: Decoder, start: tuple[float, float] | None, draws_first: bool = False
) -> FromPicture:
    """Returns the latent space of a chain that starts from a picture.

    Args:
        space: That of a chain that starts from noise.
        image: See `FromPicture`.
        decoder: The VAE.
        start: See `FromPicture`.
        draws_first: See `FromPicture`.
    """
    own = {entry.name: getattr(space, entry.name) for entry in fields(LatentSpace)}
    own |= {"fixed_size": True, "fixed_by": "the picture that this chain starts from has"}
    is_latent = image.shape[1] == space.channels
    return FromPicture(**own, image=image, encoder=None if is_latent else decoder, start=start, draws_first=draws_first)


class ImageToImage(Addition):
    """A chain that starts in the middle of the schedule, from a picture with noise added to it.

    Without `image` such a pipeline is used from text alone.
    """

    pipelines = IMAGE_TO_IMAGE
    options = frozenset({"image", "strength"})

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        image = options.get("image")
        self._image = None if image is None else prepared(pipe, image, request.height, request.width)
        self._has_noise = request.options.get("denoising_start") is None
        self._factor = pipe.vae_scale_factor

    def size(self) -> tuple[int | None, int | None]:
        """Returns the size of the picture."""
        if self._image is None:
            return None, None
        factor = 1 if self._image.shape[1] == 3 else self._factor
        return self._image.shape[-2] * factor, self._image.shape[-1] * factor

    def add(self, build: Build) -> None:
        """Makes the chain start from the picture."""
        if self._image is not None:
            start = build.request.start if self._has_noise else None
            build.space = from_picture(build.space, self._image.to(build.space.device), build.decoder, start)


def prepared(pipe: Any, image: Any, height: int | None, width: int | None) -> Tensor:
    """Returns a picture in [-1, 1] as the pipeline prepares it, or latents as they are.

    Args:
        pipe: The pipeline.
        image: A picture in any form that the pipeline takes.
        height: In pixels; None is the picture's own.
        width: In pixels.

    Raises:
        ValueError: It is a picture that requires grad.
    """
    channels = latent_channels(pipe.vae)
    if isinstance(image, Tensor) and image.requires_grad:
        if image.ndim != 4 or image.shape[1] != channels:
            raise ValueError(
                f"image: expected latents (1 or B, {channels}, h, w) because it requires grad, got "
                f"{tuple(image.shape)}; pictures are encoded without gradient, so pass chain.decode.encode(image)"
            )
        return image
    found: Tensor = pipe.image_processor.preprocess(image, height=height, width=width)
    return found.to(torch.float32)


def span_of(pipe: Any, request: Request) -> Span | None:
    """Returns which of the steps a pipeline makes by its `strength`, `denoising_start` and `denoising_end`.

    Returns:
        The part, or None where all steps are made from noise.

    Raises:
        TypeError: An argument that belongs to a picture is given without one.
        ValueError: An argument is out of range, or no step is left.
    """
    options = request.options
    accepted = inspect.signature(type(pipe).__call__).parameters
    picture = options.get("image") is not None and "strength" in accepted
    start, end = (_fraction(name, options.get(name)) for name in ("denoising_start", "denoising_end"))
    if start is not None and end is not None and start >= end:
        raise ValueError(f"denoising_start: expected less than denoising_end, {end:g}, got {start:g}")
    for name in ("strength", "denoising_start"):
        if options.get(name) is not None and "strength" in accepted and not picture:
            raise TypeError(f"{name}: expected None without an image, from which such a chain starts")
    train = pipe.scheduler.config.num_train_timesteps
    below = None if start is None else round(train - start * train)
    down_to = None if end is None else round(train - end * train)
    skip, is_noised = 0, picture and start is None
    if is_noised:
        strength, steps = strength_of(pipe, options), request.num_inference_steps
        skip = max(steps - min(int(steps * strength), steps), 0)
        # Pipelines for inpainting start from noise alone then, and others from the picture with much noise.
        is_noised = strength < 1 or "mask_image" not in accepted
    if not is_noised and below is None and down_to is None:
        return None
    return Span(skip, below, down_to, is_noised, "strength" if is_noised else "denoising_start, denoising_end")


def strength_of(pipe: Any, options: Mapping[str, Any]) -> float:
    """Returns the `strength` that is given, or the pipeline's own. Raises ValueError for one that is out of range."""
    strength = options.get("strength")
    if strength is None:
        strength = inspect.signature(type(pipe).__call__).parameters["strength"].default
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise ValueError(f"strength: expected a number from 0 to 1, got {strength!r}")
    return float(strength)


def _fraction(name: str, value: Any) -> float | None:
    """Returns an argument that is None or a fraction of the schedule."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
    return float(value)
