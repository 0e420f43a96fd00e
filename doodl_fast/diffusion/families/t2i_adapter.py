"""T2I-Adapter (Mou et al., AAAI 2024, arXiv 2302.08453): features of a picture that are added inside the UNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..guided import Guided
from ..hooks import device_of
from .additions import Addition, AroundUNet, Build, StepWeights, numbers
from .base import Request

ADAPTED = ("StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline")
FEATURES = "down_intrablock_additional_residuals"


class T2IAdapter(Addition):
    """One or several T2I-Adapters, whose features do not depend on the latents and are made once.

    If a picture that they read is a tensor that requires grad, they are called in each evaluation instead, so that its
    gradient can be taken any number of times.
    """

    component = "adapter"
    pipelines = ADAPTED
    options = frozenset({"image", "adapter_conditioning_scale", "adapter_conditioning_factor"})

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        adapter = pipe.adapter
        self._several = hasattr(adapter, "adapters")
        count = len(adapter.adapters) if self._several else 1
        self._scales = numbers("adapter_conditioning_scale", options.get("adapter_conditioning_scale", 1.0), count)
        (self._factor,) = numbers("adapter_conditioning_factor", options.get("adapter_conditioning_factor", 1.0), 1)
        if not 0 <= self._factor <= 1:
            raise ValueError(
                f"adapter_conditioning_factor: expected a fraction of the steps from 0 to 1, got {self._factor:g}"
            )
        pictures, step = options.get("image"), int(adapter.downscale_factor)
        if pictures is None:
            raise TypeError("image: expected the picture that the T2I-Adapter reads, got None")
        if self._several and not (isinstance(pictures, (list, tuple)) and len(pictures) == count):
            got = f"{len(pictures)} entries" if isinstance(pictures, (list, tuple)) else type(pictures).__name__
            raise ValueError(f"image: expected a list of {count} pictures, one for each T2I-Adapter, got {got}")
        listed = list(pictures) if self._several else [pictures]
        for entry in listed:
            _check(entry)
        self._size = _size(listed[0], request, step)
        self._pictures = [_picture(entry, *self._size).to(device_of(adapter), adapter.dtype) for entry in listed]

    def size(self) -> tuple[int | None, int | None]:
        """Returns the size that was asked for, or that of the picture, rounded down to what the adapter takes."""
        return self._size

    def add(self, build: Build) -> None:
        """Adds the features to the arguments of the UNet."""
        steps, adapter = build.request.timesteps, build.pipe.adapter
        last = int(len(steps) * self._factor)
        weights = [[float(number < last)] for number in range(len(steps))]
        gate = None
        if last < len(steps):
            gate = StepWeights(steps, weights, "adapter_conditioning_factor", device_of(build.pipe.unet))
        if any(picture.requires_grad for picture in self._pictures):
            build.kwargs["adapter_image"] = [Guided(picture, picture) for picture in self._pictures]
            build.network = AdaptedUNet(build.network, adapter, self._scales, gate)
            return
        with torch.no_grad():
            features = features_of(adapter, self._pictures, self._scales)
        build.kwargs[FEATURES] = [Guided(feature, feature) for feature in features]
        if gate is not None:
            build.network = AdaptedUNet(build.network, None, self._scales, gate)


def features_of(adapter: Any, pictures: list[Tensor], scales: list[float]) -> list[Tensor]:
    """Returns the features of the pictures, which are those of all adapters added up by their scales."""
    if hasattr(adapter, "adapters"):
        found: list[Tensor] = adapter(pictures, scales)
        return found
    return [feature * scales[0] for feature in adapter(pictures[0])]


class AdaptedUNet(AroundUNet):
    """A UNet with T2I-Adapters that are called in each evaluation, or act in a part of the steps alone.

    Args:
        unet: The UNet.
        adapter: The T2I-Adapter, or diffusers' module of several; None if their features are given.
        scales: The scale of each adapter.
        gate: For each step whether the features are added, 1 or 0; None adds them always.
    """

    def __init__(self, unet: nn.Module, adapter: Any, scales: list[float], gate: StepWeights | None) -> None:
        super().__init__(unet)
        self.adapter, self.scales, self.gate = adapter, scales, gate

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        adapter_image: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor]:
        """Returns the UNet's prediction.

        Args:
            sample: Latents (B, C, h, w).
            timestep: A 0-dim tensor.
            encoder_hidden_states: The prompts' embeddings, (B, tokens, features).
            adapter_image: The picture for each adapter, (B, channels, H, W), if there are no features in kwargs.
            **kwargs: Further arguments of the UNet.
        """
        features = kwargs.pop(FEATURES, None)
        if adapter_image is not None:
            features = features_of(self.adapter, adapter_image, self.scales)
        if self.gate is not None:
            (weight,) = self.gate(timestep)
            features = [feature * weight for feature in features]
        kwargs[FEATURES] = features
        return (self.predict(sample, timestep, encoder_hidden_states, **kwargs),)


def _check(picture: Any) -> None:
    """Raises TypeError for what is neither a picture nor a list of pictures of one kind."""
    from PIL import Image

    listed = list(picture) if isinstance(picture, (list, tuple)) else [picture]
    if not listed or not any(all(isinstance(entry, kind) for entry in listed) for kind in (Tensor, Image.Image)):
        got = ", ".join(sorted({type(entry).__name__ for entry in listed})) or "none"
        raise TypeError(f"image: expected tensors or PIL pictures, got {got}")


def _size(picture: Any, request: Request, step: int) -> tuple[int, int]:
    """Returns the height and width in pixels that were asked for, or else those of a picture, in multiples of step."""
    first = picture[0] if isinstance(picture, (list, tuple)) else picture
    rows, columns = first.shape[-2:] if isinstance(first, Tensor) else (first.height, first.width)
    return request.height or rows // step * step, request.width or columns // step * step


def _picture(picture: Any, height: int, width: int) -> Tensor:
    """Returns a picture, or a list of them, as the pipeline prepares it: tensors as they are, others resized.

    Args:
        picture: A tensor (1 or B, C, H, W), which keeps its graph, a PIL picture, or a list of either.
        height: In pixels.
        width: In pixels.
    """
    from PIL import Image

    if isinstance(picture, Tensor):
        return picture
    listed = list(picture) if isinstance(picture, (list, tuple)) else [picture]
    if all(isinstance(entry, Tensor) for entry in listed):
        return torch.cat([entry[None] if entry.ndim == 3 else entry for entry in listed])
    arrays = [np.array(entry.resize((width, height), resample=Image.Resampling.LANCZOS)) for entry in listed]
    rows = [torch.from_numpy(array if array.ndim == 3 else array[..., None]) for array in arrays]
    return torch.stack(rows).permute(0, 3, 1, 2).float() / 255
