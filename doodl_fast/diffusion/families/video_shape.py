"""The latent space of a pipeline that makes videos."""

from __future__ import annotations

from typing import Any

from ..hooks import device_of
from ..latent_space import check_size
from ..video import VideoSpace
from .base import Request, network_of


def video_space(pipe: Any, request: Request, defaults: tuple[int, int, int], patch: int, **shape: Any) -> VideoSpace:
    """Returns the latent space of a pipeline of videos, for the size and the number of frames that are asked for.

    Args:
        pipe: The pipeline.
        request: Its height, width and `num_frames`.
        defaults: The number of frames, the height and the width in pixels where none is given.
        patch: Latents per patch of the network, along height and width.
        **shape: channels, scale_factor, frame_factor and other attributes of `VideoSpace`.

    Raises:
        ValueError: The VAE or the network cannot take the size or the number of frames.
    """
    given = request.options.get("num_frames"), request.height, request.width
    frames, height, width = (own if value is None else value for own, value in zip(defaults, given, strict=True))
    for name, pixels in (("height", height), ("width", width)):
        check_size(name, pixels, shape["scale_factor"], patch, shape.get("largest"))
    device = device_of(network_of(pipe))
    space = VideoSpace(height=height, width=width, num_frames=frames, device=device, patch=patch, **shape)
    space.latent_frames()
    return space
