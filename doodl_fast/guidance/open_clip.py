"""`load_open_clip`: models of the open_clip package, in the form that the guides by CLIP take (arXiv 2212.07143)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.networks import check_source, loading
from .cutouts import FITS

RESIZING = {"shortest": "crop", "squash": "squeeze", "longest": "pad"}
"""open_clip's names of what becomes of pictures that are not square, and ours."""
RESAMPLING = {"bilinear": 2, "bicubic": 3}


@dataclass
class OpenClipProcessor:
    """How an open_clip model wants pictures and texts, under the names of a transformers processor.

    Attributes:
        image_mean: Three numbers that are subtracted from pixels in [0, 1].
        image_std: Three numbers that they are divided by then.
        resample: PIL's number of the interpolation.
        fit: How whole pictures become squares, a key of `cutouts.FITS`.
        tokenizer: What makes tokens of texts.
    """

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    resample: int
    fit: str
    tokenizer: Any


class _Tokenizer:
    """An open_clip tokenizer that is called as those of transformers are."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.model_max_length = tokenizer, length

    def __call__(self, texts: Sequence[str], **options: Any) -> SimpleNamespace:
        """Returns tokens (B, length), filled up as the model was trained with."""
        return SimpleNamespace(input_ids=self.tokenizer(list(texts), context_length=self.model_max_length))


class OpenClipModel(nn.Module):
    """An open_clip model with the methods and attributes of a transformers CLIPModel that guides use.

    Args:
        model: A model of open_clip: CLIP, CustomTextCLIP or CoCa. It becomes a part of this one and is not changed.

    Raises:
        TypeError: `model` has no `encode_image` and `encode_text`.
        ValueError: It reads pictures that are not square.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not (callable(getattr(model, "encode_image", None)) and callable(getattr(model, "encode_text", None))):
            raise TypeError(f"model: expected a model of open_clip, got {type(model).__name__}")
        size, length = model.visual.image_size, getattr(getattr(model, "text", model), "context_length", None)
        sides = set(size) if isinstance(size, (tuple, list)) else {size}
        if len(sides) != 1:
            raise ValueError(f"model: expected one that reads square pictures, got the image_size {size!r}")
        self.clip = model
        self.config = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=int(sides.pop())),
            text_config=SimpleNamespace(max_position_embeddings=int(length or model.context_length)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of what cosines are multiplied by."""
        scale: Tensor = self.clip.logit_scale
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to logits, or None."""
        return getattr(self.clip, "logit_bias", None)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeds normalised pictures (B, 3, size, size), to (B, D)."""
        features: Tensor = self.clip.encode_image(pixel_values)
        return features

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        """Embeds tokens (B, length), to (B, D)."""
        features: Tensor = self.clip.encode_text(input_ids)
        return features


def load_open_clip(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[OpenClipModel, OpenClipProcessor]:
    """Loads a model of open_clip, which must be installed (`pip install open_clip_torch`).

    Args:
        source: A folder with open_clip_config.json and the weights, or a hub id.
        device: Where the model is put.
        dtype: The dtype of its weights.

    Returns:
        What the guides by CLIP take as `model` and `processor`.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: There is no such model, or it cannot be loaded.

    Example:
        >>> loss = TextScore(*load_open_clip("laion/CLIP-convnext_base_w-laion2B-s13B-b82K"), "a dog with a hat")
    """
    name = check_source(source, "open_clip_config.json", "guidance model")
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"guidance model: {name!r} is a model of open_clip, which cannot be imported ({error}); expected it to be "
            "installed: pip install open_clip_torch"
        ) from error
    found = f"{'local-dir' if Path(name).is_dir() else 'hf-hub'}:{name}"
    with loading(name, "guidance model"):
        loaded = open_clip.create_model_from_pretrained(found, return_transform=False, weights_only=True)
        tokenizer = open_clip.get_tokenizer(found)
        settings = open_clip.get_model_preprocess_cfg(loaded)
    model = OpenClipModel(loaded.to(device, dtype).eval())
    fit = RESIZING.get(settings.get("resize_mode", "shortest"))
    resample = RESAMPLING.get(settings.get("interpolation", "bicubic"))
    if fit not in FITS or resample is None or (fit == "pad" and settings.get("fill_color", 0) != 0):
        raise ValueError(
            f"guidance model: expected pictures that are resized by one of {', '.join(RESIZING)} with zeros around "
            f"them and {' or '.join(RESAMPLING)} interpolation, got {settings!r} in {name!r}"
        )
    words = _Tokenizer(tokenizer, model.config.text_config.max_position_embeddings)
    return model, OpenClipProcessor(tuple(settings["mean"]), tuple(settings["std"]), resample, fit, words)
