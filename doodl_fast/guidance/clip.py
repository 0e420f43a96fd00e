"""What the guides by CLIP share (Radford et al., arXiv 2103.00020): the model, its view of a picture, a distance."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..diffusion.module_copies import frozen_copy
from ..diffusion.networks import loading, run_in_dtype
from ..frozen import level_of
from .arguments import check_channels, check_count, check_positive
from .cutouts import FITS, check_images, normalized, random_cutouts, unit_range
from .model_loading import load_model, load_words
from .naflex import Patches

if TYPE_CHECKING:
    from typing_extensions import Self

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PIL_RESAMPLING = {2: "bilinear", 3: "bicubic"}


def spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """Computes half the squared angle between vectors.

    It equals `2 arcsin(|x - y| / 2)^2` of the normalised vectors. The angle is computed by atan2 of |x - y| and
    |x + y|, whose gradient stays finite for equal and for opposite vectors.

    Args:
        x: Vectors (..., D) of any length.
        y: Vectors of the same D.

    Returns:
        A tensor (...), in the shape to which x and y are broadcast, in squared radians.
    """
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    chord, complement = torch.linalg.vector_norm(x - y, dim=-1), torch.linalg.vector_norm(x + y, dim=-1)
    return 2 * torch.atan2(chord, complement).square()


def load_clip(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    processor: str | Path | None = None,
) -> tuple[Any, Any]:
    """Loads a CLIP or a SigLIP from safetensors files.

    Args:
        source: A folder or a hub id.
        device: Where the model is put.
        dtype: The dtype of its weights.
        processor: The folder or the hub id of the processor, if it is not that of the model.

    Returns:
        The transformers CLIPModel or SiglipModel in eval mode, and its processor.

    Raises:
        ValueError: There is none, or some of its weights are missing or have another shape.
    """
    from transformers import AutoModel, AutoProcessor

    model, name = load_model(AutoModel, source, dtype)
    if processor is not None:
        return model.to(device), load_words(AutoProcessor, processor)
    with loading(name, "guidance model"):
        return model.to(device), AutoProcessor.from_pretrained(name)


class ClipGuide:
    """The base of guides that look at CLIP's embedding of pictures.

    By itself it has no target; `ClipText`, `ClipImage` and `Aesthetic` derive from it. The model is called in its own
    dtype, in eval mode and without gradients of its weights, and is not changed.

    Args:
        model: A transformers CLIPModel.
        processor: Its processor or image processor, of which the mean, the deviation and the interpolation are taken.
            Those that it lacks are CLIP's own.
        num_cutouts: How many random squares of each picture the guide looks at. With 0 it looks at the whole picture,
            whose shorter side is resized and whose center is cropped, or which is resized to the square if that is
            what the processor does.
        cut_power: How the sizes of cutouts are distributed, see `random_cutouts`.
        lean: Whether graphs keep no more than the gradient needs, to the same bits (docs/lean.md).

    Raises:
        TypeError: `model` is no CLIPModel.
        ValueError: Another argument is out of range.

    Attributes:
        fit: How a whole picture becomes a square, a key of `cutouts.FITS`: "squeeze" if the processor names a height
            and a width to resize to, as that of SigLIP, else "crop"; or what the processor has as its own `fit`. For
            SigLIP 2 NaFlex it is "patches": pictures keep their shape.
    """

    def __init__(
        self, model: Any, processor: Any, num_cutouts: int = 0, cut_power: float = 0.3, lean: bool | str = True
    ) -> None:
        self.num_cutouts = check_count(num_cutouts, "num_cutouts", 0)
        self.cut_power = check_positive(cut_power, "cut_power")
        if not callable(getattr(model, "get_image_features", None)):
            raise TypeError(f"model: expected a transformers CLIPModel, got {type(model).__name__}")
        pictures = getattr(processor, "image_processor", processor)
        self.patches = Patches.of(model, pictures)
        side: Any = getattr(model.config.vision_config, "image_size", None)
        if side is None and self.patches is None:
            raise ValueError(
                f"model: expected one whose vision_config has image_size or, as that of SigLIP 2 NaFlex, num_patches, "
                f"got {type(model).__name__} without both; take a CLIP or a SigLIP"
            )
        self.model, self.lean = model, level_of(lean)
        self._chunk: int | None = None
        self.size = int(side) if self.patches is None else self.patches.square
        self.mean = check_channels(getattr(pictures, "image_mean", None) or CLIP_MEAN, "processor.image_mean")
        self.std = check_channels(
            getattr(pictures, "image_std", None) or CLIP_STD, "processor.image_std", positive=True
        )
        self.mode = PIL_RESAMPLING.get(int(getattr(pictures, "resample", None) or 3), "bicubic")
        # SigLIP's processors resize to the square and crop nothing.
        squeezed = "height" in (getattr(pictures, "size", None) or {})
        self.fit: str = getattr(pictures, "fit", None) or ("squeeze" if squeezed else "crop")
        if self.patches is not None:
            self.fit = "patches"
        self.target: Tensor  # (1, D), normalised, float32

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of images (B, 3, H, W) in [-1, 1]."""
        features = self.look(images)
        return spherical_distance(features, self.target.to(features)).mean()

    def look(self, images: Tensor) -> Tensor:
        """Embeds what the guide sees of images.

        Args:
            images: A floating tensor (B, 3, H, W) in [-1, 1].

        Returns:
            Embeddings (N, D), where N is B, or B times the number of cutouts.
        """
        pixels = unit_range(check_images(images))
        if self.num_cutouts:
            return self.embed(random_cutouts(pixels, self.num_cutouts, self.size, self.cut_power))
        return self.embed(self.view(pixels))

    def view(self, pixels: Tensor) -> Tensor:
        """Makes squares (B, 3, size, size) of whole pictures (B, 3, H, W), or what `fit` says."""
        if self.fit == "patches" and self.patches is not None:
            return self.patches.resize(pixels, self.mode)
        return FITS[self.fit](pixels, self.size, self.mode)

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeds square pictures (B, 3, size, size), or those of `view`, in [0, 1], to (B, D) in float32 at least."""

        def features(x: Tensor) -> Tensor:
            if self._chunk is None:
                return self._features(x)
            return torch.cat(
                [
                    checkpoint(self._features, part, use_reentrant=False, preserve_rng_state=False)
                    for part in x.split(self._chunk)
                ]
            )

        return run_in_dtype(features, normalized(pixels, self.mean, self.std), self.model.dtype)

    def _features(self, x: Tensor) -> Tensor:
        """Calls the model."""
        with frozen_copy(self.model, lean=self.lean) as model:
            if self.patches is not None:
                return projected(model.get_image_features(**self.patches.arguments(x)))
            return image_features(model, x)

    def leaner(self) -> Self | None:
        """Returns the same guide for less memory and more time, or None if there is none.

        Its cutouts are embedded in chunks, each a quarter of what it was, and embedded again for a gradient.
        """
        size = self.num_cutouts if self._chunk is None else self._chunk
        if size < 2:
            return None
        other = copy.copy(self)
        other._chunk = max(1, size // 4)
        return other


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Embeds normalised pictures (B, 3, h, w) by a transformers CLIPModel, to (B, D)."""
    return projected(model.get_image_features(pixel_values=pixels))


def projected(output: Any) -> Tensor:
    """Returns the features in a CLIPModel's output, which transformers 5 wraps and earlier versions do not."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
