"""Classifier guidance to one class: cross-entropy of a transformers image classifier."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.networks import check_source, frozen, loading, run_in_dtype
from .cutouts import check_images, resize_and_crop, unit_range


def load_classifier(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """(transformers image-classification model in eval mode, its processor or None); safetensors only.

    Raises ValueError when there is none.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    name = check_source(source, "config.json", "guidance model")
    with loading(name, "guidance model"):
        model = AutoModelForImageClassification.from_pretrained(name, dtype=dtype, use_safetensors=True)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):  # saved without one: [-1, 1] in the config's size
        processor = None
    return model.to(device).eval(), processor


class Classifier:
    """Cross-entropy between a classifier's logits and one class: `loss(images)`, a mean over pictures.

    model: transformers image-classification model, or a module from pixels to logits (N, classes), to an object with
        `.logits`, or to a tuple that ends with them; any dtype.
    processor: its image processor; mean, std (three floats each) and size (an int) override what it says. Without
        either: mean = std = 0.5, i.e. pixels in [-1, 1], and the config's image_size, or else the size they come in.
    label: the class's index, or its name in the model's config (ImageNet's synonyms count, case does not).

    Raises ValueError, for an unknown name with the closest ones; TypeError for another kind of label.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        label: int | str,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a classifier, got {type(model).__name__}")
        config = getattr(model, "config", None)
        self.model = model
        self.label = find_label(label, getattr(config, "id2label", None) or {})
        self.mean = tuple(mean or getattr(processor, "image_mean", None) or (0.5, 0.5, 0.5))
        self.std = tuple(std or getattr(processor, "image_std", None) or (0.5, 0.5, 0.5))
        self.size = size or _size(processor) or getattr(config, "image_size", None)
        self.mode = "bicubic" if getattr(processor, "resample", 2) == 3 else "bilinear"

    def __call__(self, images: Tensor) -> Tensor:
        """0-dim loss of images (B, 3, H, W) in [-1, 1]."""
        logits = self.logits(images)
        if self.label >= logits.shape[-1]:
            raise ValueError(f"label: expected an index below {logits.shape[-1]} (the classes), got {self.label}")
        target = torch.full((len(logits),), self.label, device=logits.device)
        return F.cross_entropy(logits, target)

    def logits(self, images: Tensor) -> Tensor:
        """(B, classes) in float32 at least, of images (B, 3, H, W) in [-1, 1]."""
        pixels = unit_range(check_images(images))
        if self.size is not None:
            pixels = resize_and_crop(pixels, self.size, self.mode)
        mean, std = (pixels.new_tensor(values).reshape(1, 3, 1, 1) for values in (self.mean, self.std))
        weight = next((p for p in getattr(self.model, "parameters", list)() if p.is_floating_point()), pixels)
        with frozen(self.model):
            return run_in_dtype(self._run, (pixels - mean) / std, weight.dtype)

    def _run(self, x: Tensor) -> Tensor:
        output = self.model(x)
        output = output[-1] if isinstance(output, tuple) else output
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        label: int | str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Classifier:
        """From a folder or a hub id. Raises ValueError when there is none."""
        model, processor = load_classifier(source, device, dtype)
        return cls(model, processor, label)


def find_label(label: int | str, names: Mapping[int, str]) -> int:
    """The index of a class given by index (also as digits) or by name. Errors as in `Classifier`."""
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError(f"label: expected a class's index or name, got {label!r}")
    by_name = {str(name).casefold(): int(index) for index, name in names.items()}
    for index, name in names.items():
        for synonym in str(name).split(","):
            by_name.setdefault(synonym.strip().casefold(), int(index))
    if isinstance(label, str) and label.strip().casefold() in by_name:
        return by_name[label.strip().casefold()]
    if isinstance(label, int) or label.strip().isdecimal():
        index = int(label)
        if index < 0 or (names and index not in {int(i) for i in names}):
            raise ValueError(f"label: expected an index from 0 to {max(len(names) - 1, 0)}, got {label!r}")
        return index
    close = difflib.get_close_matches(label.strip().casefold(), by_name, n=5, cutoff=0.4)
    known = [str(names[by_name[name]]) for name in close] or [str(name) for name in list(names.values())[:5]]
    listed = ", ".join(map(repr, dict.fromkeys(known)))
    raise ValueError(f"label: {label!r} is not one of the model's {len(names)} classes; the closest are {listed}")


def _size(processor: Any) -> int | None:
    """The side of the square that a processor makes, from whichever of its entries says so."""
    for name in ("crop_size", "size"):
        value: Any = getattr(processor, name, None)
        if isinstance(value, int):
            return value
        for side in ("height", "shortest_edge"):
            found = value.get(side) if isinstance(value, Mapping) else getattr(value, side, None)
            if found:
                return int(found)
    return None
