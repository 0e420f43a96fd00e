"""`ClipImage`: guidance to other pictures by CLIP (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.images import open_picture
from .clip import ClipGuide, load_clip
from .cutouts import check_images, unit_range


class ClipImage(ClipGuide):
    """The distance between pictures and the mean direction of other pictures in CLIP's embedding.

    Args:
        model: A transformers CLIPModel, in any dtype.
        images: The other pictures: a floating tensor (N, 3, H, W) in [-1, 1], or files or PIL images of any sizes.
        processor: The model's processor or image processor; see `ClipGuide`.
        num_cutouts: See `ClipGuide`. The other pictures are looked at as a whole.
        cut_power: See `ClipGuide`.
        lean: See `ClipGuide`.

    Raises:
        TypeError: `model` is no CLIPModel, or `images` holds something else than pictures.
        ValueError: `images` is empty, a file cannot be read, or another argument is out of range.
    """

    def __init__(
        self,
        model: Any,
        images: Tensor | Sequence[Any],
        processor: Any = None,
        num_cutouts: int = 0,
        cut_power: float = 0.3,
        lean: bool | str = True,
    ) -> None:
        super().__init__(model, processor, num_cutouts, cut_power, lean)
        if isinstance(images, (str, Path)):
            raise TypeError(f"images: expected a tensor, or a list of files or pictures, got {images!r} alone")
        pictures = list(images.split(1)) if isinstance(images, Tensor) else [open_picture(image) for image in images]
        if not pictures:
            raise ValueError("images: expected at least one picture, got none")
        squares = [self.view(unit_range(check_images(p))) for p in pictures]
        alike = [torch.cat(squares)] if self.fit != "patches" else squares  # which have shapes of their own
        with torch.no_grad():
            embedded = F.normalize(torch.cat([self.embed(part.to(model.device)) for part in alike]), dim=-1)
        self.target = F.normalize(embedded.mean(0, keepdim=True), dim=-1)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        images: Tensor | Sequence[Any],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> ClipImage:
        """Loads the model from a folder or a hub id.

        Args:
            source: The folder or the hub id.
            images: The other pictures.
            device: Where the model is put.
            dtype: The dtype of its weights.
            **options: `num_cutouts` and `cut_power`.

        Raises:
            ValueError: There is no such model, it lacks weights, or an argument is out of range.
        """
        model, processor = load_clip(source, device, dtype)
        return cls(model, images, processor, **options)
