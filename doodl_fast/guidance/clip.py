"""CLIP guidance (Radford et al., arXiv 2103.00020): how far pictures are from a text, or from other pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..diffusion.images import open_picture
from ..diffusion.networks import check_source, frozen, loading, run_in_dtype
from .cutouts import check_images, random_cutouts, resize_and_crop, unit_range

if TYPE_CHECKING:
    from typing_extensions import Self

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PIL_RESAMPLING = {2: "bilinear", 3: "bicubic"}


def spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """Half the squared angle between x and y (..., D), in radians: shape (...) of both, broadcast.

    It equals `2 arcsin(|x - y| / 2)^2` of the normalised vectors, but with the angle from atan2 of chord and
    complementary chord, whose gradient stays finite for equal and for opposite vectors.
    """
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    chord, complement = torch.linalg.vector_norm(x - y, dim=-1), torch.linalg.vector_norm(x + y, dim=-1)
    return 2 * torch.atan2(chord, complement).square()


def load_clip(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """(transformers CLIPModel in eval mode, its processor) from a folder or a hub id; safetensors only.

    Raises ValueError when there is none.
    """
    from transformers import AutoProcessor, CLIPModel

    name = check_source(source, "config.json", "guidance model")
    with loading(name, "guidance model"):
        model = CLIPModel.from_pretrained(name, dtype=dtype, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(name)
    return model.to(device).eval(), processor


class ClipGuide:
    """What the guides that look at CLIP's embedding of pictures share; `ClipText` and `ClipImage` compare it with a
    target.

    model: transformers CLIPModel, in any dtype. processor: gives mean, deviation and interpolation if it has them;
    CLIP's own otherwise. num_cutouts: 0 looks at the whole picture (shorter side resized, centre cropped), else at
    that many random squares of it; cut_power: see `random_cutouts`.
    """

    def __init__(self, model: Any, processor: Any, num_cutouts: int = 0, cut_power: float = 0.3) -> None:
        if isinstance(num_cutouts, bool) or not isinstance(num_cutouts, int) or num_cutouts < 0:
            raise ValueError(f"num_cutouts: expected an int of at least 0, got {num_cutouts!r}")
        if not cut_power > 0:
            raise ValueError(f"cut_power: expected a positive number, got {cut_power!r}")
        if not callable(getattr(model, "get_image_features", None)):
            raise TypeError(f"model: expected a transformers CLIPModel, got {type(model).__name__}")
        pictures = getattr(processor, "image_processor", processor)
        self.model = model
        self.num_cutouts, self.cut_power = num_cutouts, cut_power
        self._chunk: int | None = None
        self.size = int(model.config.vision_config.image_size)
        self.mean = tuple(getattr(pictures, "image_mean", None) or CLIP_MEAN)
        self.std = tuple(getattr(pictures, "image_std", None) or CLIP_STD)
        self.mode = PIL_RESAMPLING.get(int(getattr(pictures, "resample", None) or 3), "bicubic")
        self.target: Tensor  # (1, D), normalised, float32

    def __call__(self, images: Tensor) -> Tensor:
        """0-dim loss of images (B, 3, H, W) in [-1, 1]."""
        features = self.look(images)
        return spherical_distance(features, self.target.to(features)).mean()

    def look(self, images: Tensor) -> Tensor:
        """The embeddings (N, D) of what the guide sees of images (B, 3, H, W) in [-1, 1]: of B squares or cutouts."""
        pixels = unit_range(check_images(images))
        if self.num_cutouts:
            return self.embed(random_cutouts(pixels, self.num_cutouts, self.size, self.cut_power))
        return self.embed(resize_and_crop(pixels, self.size, self.mode))

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, D) of square pictures (B, 3, size, size) in [0, 1], in float32 at least."""
        mean, std = (pixels.new_tensor(values).reshape(1, 3, 1, 1) for values in (self.mean, self.std))

        def features(x: Tensor) -> Tensor:
            if self._chunk is None:
                return self._features(x)
            return torch.cat([checkpoint(self._features, part, use_reentrant=False) for part in x.split(self._chunk)])

        return run_in_dtype(features, (pixels - mean) / std, self.model.dtype)

    def _features(self, x: Tensor) -> Tensor:
        with frozen(self.model):
            return image_features(self.model, x)

    def leaner(self) -> Self | None:
        """The same guide for less memory: cutouts in chunks, a quarter of what they were, each computed again for a
        gradient. None where no cutout is left to part from another."""
        size = self.num_cutouts if self._chunk is None else self._chunk
        if size < 2:
            return None
        other = copy.copy(self)
        other._chunk = max(1, size // 4)
        return other


class ClipText(ClipGuide):
    """CLIP distance between pictures and a text: `loss(images)`, a mean over pictures and cutouts.

    model, num_cutouts, cut_power: see above. processor: a CLIPProcessor, or a tokenizer alone. prompt: the text, cut at
    the length that the model reads. Raises TypeError or ValueError, naming the argument.
    """

    def __init__(self, model: Any, processor: Any, prompt: str, num_cutouts: int = 0, cut_power: float = 0.3) -> None:
        super().__init__(model, processor, num_cutouts, cut_power)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt: expected a text to guide to, got {prompt!r}")
        tokenizer: Callable[..., Any] | None = getattr(processor, "tokenizer", processor)
        if not callable(tokenizer) or not hasattr(tokenizer, "model_max_length"):
            raise TypeError(f"processor: expected a CLIPProcessor or a tokenizer, got {type(processor).__name__}")
        length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        tokens = tokenizer([prompt], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with frozen(model), torch.no_grad():
            embedded = _tensor(model.get_text_features(input_ids=tokens.input_ids.to(model.device)))
        self.prompt = prompt
        self.target = F.normalize(embedded.to(torch.promote_types(embedded.dtype, torch.float32)), dim=-1)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        prompt: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> ClipText:
        """From a folder or a hub id; options are num_cutouts and cut_power. Raises ValueError when there is none."""
        model, processor = load_clip(source, device, dtype)
        return cls(model, processor, prompt, **options)


class ClipImage(ClipGuide):
    """CLIP distance between pictures and the mean direction of other pictures: `loss(images)`.

    images: a tensor (N, 3, H, W) in [-1, 1], or files or PIL pictures of any sizes. The rest as for `ClipText`.
    Raises TypeError or ValueError, naming the argument; FileNotFoundError or OSError for files.
    """

    def __init__(
        self,
        model: Any,
        images: Tensor | Sequence[Any],
        processor: Any = None,
        num_cutouts: int = 0,
        cut_power: float = 0.3,
    ) -> None:
        super().__init__(model, processor, num_cutouts, cut_power)
        pictures = list(images.split(1)) if isinstance(images, Tensor) else [open_picture(image) for image in images]
        if not pictures:
            raise ValueError("images: expected at least one picture, got none")
        squares = [resize_and_crop(unit_range(check_images(p)), self.size, self.mode) for p in pictures]
        with torch.no_grad():
            embedded = F.normalize(self.embed(torch.cat(squares).to(model.device)), dim=-1)
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
        """From a folder or a hub id; options are num_cutouts and cut_power. Raises ValueError when there is none."""
        model, processor = load_clip(source, device, dtype)
        return cls(model, images, processor, **options)


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """What a transformers CLIPModel makes of pictures (B, 3, h, w) as it wants them, normalised: (B, D)."""
    return _tensor(model.get_image_features(pixel_values=pixels))


def _tensor(output: Any) -> Tensor:
    """transformers 5 wraps the projected features; before, they came as they are."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
