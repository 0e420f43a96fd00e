"""Flows that start from a picture: SD3, FLUX.1, Qwen-Image, Chroma and Z-Image (SDEdit, arXiv 2108.01073)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..decoder import vae_scale_factor
from ..span import Span
from .base import Family, Parts, Request
from .chroma import Chroma
from .flux import Flux
from .image_to_image import from_picture, prepared, strength_of
from .qwen_image import QwenImage
from .sd3 import StableDiffusion3
from .z_image import ZImage

OPTIONS = frozenset({"image", "strength"})


class FlowFromPicture(Family):
    """What a family whose pipeline starts from noise lacks for the pipeline that starts from a picture.

    `image` is a picture, as the pipeline takes it, or its latents, which may require grad. `strength` says how many of
    the steps are made; its default is the pipeline's.
    """

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """Returns the height and width of a picture in pixels: those of the family from noise."""
        raise NotImplementedError

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        image = request.options.get("image")
        if image is None:
            raise TypeError(f"image: expected a picture, from which {type(pipe).__name__} starts, got None")
        strength = strength_of(pipe, request.options)
        steps = request.num_inference_steps
        span = Span(skip=int(max(steps - min(steps * strength, steps), 0)), from_picture=True)
        return {**super().set_timesteps(pipe, self._sized(pipe, request)), "span": span}

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        sized = self._sized(pipe, request)
        image = prepared(pipe, request.options["image"], sized.height, sized.width)
        given = {name: value for name, value in sized.options.items() if name not in OPTIONS}
        parts = super().parts(pipe, replace(sized, options=given))  # type: ignore[safe-super]
        space = from_picture(parts.space, image.to(parts.space.device), parts.decoder, request.start)
        return parts._replace(space=space)

    def _sized(self, pipe: Any, request: Request) -> Request:
        """Returns the arguments with the height and width to which the pipeline brings the picture."""
        height, width = self.size(pipe, request)
        return replace(request, height=height, width=width)


class StableDiffusion3FromPicture(FlowFromPicture, StableDiffusion3):
    """Stable Diffusion 3 and 3.5 from a picture."""

    pipelines = ("StableDiffusion3Img2ImgPipeline",)

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """See `StableDiffusion3.size`."""
        return StableDiffusion3.size(self, pipe, request)


class FluxFromPicture(FlowFromPicture, Flux):
    """FLUX.1 from a picture."""

    pipelines = ("FluxImg2ImgPipeline",)
    guidance_scale = 7.0

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """See `Flux.size`."""
        return Flux.size(self, pipe, request)


class QwenImageFromPicture(FlowFromPicture, QwenImage):
    """Qwen-Image from a picture."""

    pipelines = ("QwenImageImg2ImgPipeline",)

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """See `QwenImage.size`."""
        return QwenImage.size(self, pipe, request)


class ChromaFromPicture(FlowFromPicture, Chroma):
    """Chroma from a picture."""

    pipelines = ("ChromaImg2ImgPipeline",)

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """See `Chroma.size`."""
        return Chroma.size(self, pipe, request)


class ZImageFromPicture(FlowFromPicture, ZImage):
    """Z-Image from a picture, whose size the result has."""

    pipelines = ("ZImageImg2ImgPipeline",)

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """Returns the height and width that are asked for, or those of the picture."""
        if request.height is not None and request.width is not None:
            return request.height, request.width
        image = prepared(pipe, request.options["image"], None, None)
        factor = 1 if image.shape[1] == 3 else vae_scale_factor(pipe.vae)
        height, width = (pixels * factor for pixels in image.shape[-2:])
        return request.height or height, request.width or width
