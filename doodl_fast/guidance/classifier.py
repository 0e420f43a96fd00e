"""`Classifier`: guidance to one class by an image classifier."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..frozen import level_of
from .model_loading import load_model
from .view import View, load_processor, run_network


def load_classifier(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Loads an image classifier from safetensors files.

    Args:
        source: A folder or a hub id.
        device: Where the model is put.
        dtype: The dtype of its weights.

    Returns:
        The transformers model in eval mode, and its image processor, or None if it was saved without one.

    Raises:
        ValueError: There is none, or some of its weights are missing or have another shape, as the head of a model that
            was not trained to classify.
    """
    from transformers import AutoModelForImageClassification

    model, name = load_model(AutoModelForImageClassification, source, dtype)
    return model.to(device), load_processor(name)


class Classifier:
    """The cross-entropy between a classifier's prediction for pictures and one class, as a mean over pictures.

    The model is called in its own dtype, in eval mode and without gradients of its weights, and is not changed.

    Args:
        model: A transformers image classifier, or any callable from pixels (N, 3, h, w) to logits (N, classes), to an
            object that has them as `.logits`, or to a tuple that ends with them.
        processor: Its image processor, or None.
        label: The index of the class, or its name in the model's config. Each of the synonyms that ImageNet's names
            list counts, and case does not.
        mean: Three numbers that are subtracted from pixels in [0, 1]. By default those of the processor, else 0.5.
        std: Three positive numbers that pixels are divided by then. By default those of the processor, else 0.5.
        size: The side of the square, in pixels, to which pictures are resized and cropped. By default that of the
            processor, else that of the config, else pictures keep their size.
        lean: Whether graphs keep no more than the gradient needs, to the same bits (docs/lean.md).

    Raises:
        TypeError: `model` cannot be called, or `label` is neither an int nor a string.
        ValueError: There is no such class, and the error lists the names that are closest; or another argument is out
            of range.

    Example:
        >>> loss = Classifier.from_pretrained("microsoft/resnet-50", "tench")
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
        lean: bool | str = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a classifier, got {type(model).__name__}")
        config = getattr(model, "config", None)
        self.model, self.lean = model, level_of(lean)
        self.label = find_label(label, getattr(config, "id2label", None) or {})
        self.view = View.of(model, processor, mean, std, size)

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of images (B, 3, H, W) in [-1, 1]."""
        logits = self.logits(images)
        if self.label >= logits.shape[-1]:
            raise ValueError(f"label: expected an index below {logits.shape[-1]} (the classes), got {self.label}")
        target = torch.full((len(logits),), self.label, device=logits.device)
        return F.cross_entropy(logits, target)

    def logits(self, images: Tensor) -> Tensor:
        """Computes logits (B, classes), in float32 at least, of images (B, 3, H, W) in [-1, 1]."""
        return run_network(self.model, self.view(images), _logits, self.lean)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        label: int | str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Classifier:
        """Loads the model from a folder or a hub id.

        Args:
            source: The folder or the hub id.
            label: The class.
            device: Where the model is put.
            dtype: The dtype of its weights.

        Raises:
            TypeError: `label` is neither an int nor a string.
            ValueError: There is no such model or class, or the model lacks weights.
        """
        model, processor = load_classifier(source, device, dtype)
        return cls(model, processor, label)


def _logits(output: Any) -> Tensor:
    """The logits in what a classifier returns."""
    output = output[-1] if isinstance(output, tuple) else output
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def find_label(label: int | str, names: Mapping[int, str]) -> int:
    """Returns the index of a class that is given by its index, also as digits, or by its name.

    Args:
        label: The index or the name.
        names: The names of the classes by their indices, or an empty mapping if they are not known.

    Raises:
        TypeError: `label` is neither an int nor a string.
        ValueError: There is no such class.
    """
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
