"""`View`: how a network of transformers, or any other one, wants to see pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..diffusion.images import open_picture
from ..diffusion.module_copies import frozen_copy
from ..diffusion.networks import run_in_dtype
from ..frozen import Level
from .arguments import check_channels, check_count
from .cutouts import FITS, check_images, normalized, unit_range

HALF = (0.5, 0.5, 0.5)
NONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
"""The mean and the deviation that leave pixels in [0, 1] as they are."""


@dataclass(frozen=True)
class View:
    """Makes of pictures what a network reads.

    Attributes:
        mean: Three numbers that are subtracted from pixels in [0, 1].
        std: Three positive numbers that they are divided by then.
        size: The side of the square that pictures become, in pixels; None if they keep their size.
        mode: The interpolation, "bicubic" or "bilinear".
        fit: How pictures become squares, a key of `cutouts.FITS`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None
    mode: str
    fit: str

    @classmethod
    def of(
        cls,
        model: Any,
        processor: Any,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
        fit: str = "crop",
    ) -> View:
        """What a model's processor and its config say.

        Args:
            model: The model, whose config may name an `image_size`.
            processor: Its image processor, or None.
            mean: Takes the place of the processor's. Without either it is 0.5, and 0 if the processor does not
                normalise.
            std: Takes the place of the processor's. Without either it is 0.5, and 1 if the processor does not
                normalise.
            size: Takes the place of the processor's and the config's.
            fit: How pictures become squares.

        Raises:
            ValueError: An argument is out of range.
        """
        has_mean = bool(getattr(processor, "image_mean", None))
        plain = processor is not None and not getattr(processor, "do_normalize", has_mean)
        center, spread = NONE if plain else (HALF, HALF)
        if not plain:
            center = getattr(processor, "image_mean", None) or center
            spread = getattr(processor, "image_std", None) or spread
        if size is not None:
            check_count(size, "size", 1)
        side = size or size_of(processor) or getattr(getattr(model, "config", None), "image_size", None)
        if isinstance(side, (list, tuple)) and len(set(side)) == 1:
            side = side[0]
        mode = "bicubic" if getattr(processor, "resample", 2) == 3 else "bilinear"
        return cls(
            check_channels(center if mean is None else mean, "mean"),
            check_channels(spread if std is None else std, "std", positive=True),
            side if isinstance(side, int) else None,
            mode,
            fit,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Returns normalised pixels (B, 3, h, w), in float32 at least, of images (B, 3, H, W) in [-1, 1]."""
        pixels = unit_range(check_images(images))
        if self.size is not None:
            pixels = FITS[self.fit](pixels, self.size, self.mode)
        return normalized(pixels, self.mean, self.std)


def run_network(model: Any, pixels: Tensor, pick: Callable[[Any], Tensor], lean: Level) -> Tensor:
    """Calls a network in its own dtype, in eval mode, and without gradients of its weights.

    Args:
        model: A module, which is not changed, or any other callable.
        pixels: Its argument.
        pick: From what it returns to a tensor.
        lean: How little graphs keep.

    Returns:
        That tensor, in float32 at least.
    """

    def run(x: Tensor) -> Tensor:
        with frozen_copy(model, lean=lean) as network:
            return pick(network(x))

    weight = next((p for p in getattr(model, "parameters", list)() if p.is_floating_point()), pixels)
    return run_in_dtype(run, pixels, weight.dtype)


def target_pictures(target: Any, model: Any = None) -> Tensor:
    """Returns target pictures (B, 3, H, W) in [-1, 1], on the device of a network's weights if it has any.

    Args:
        target: A floating tensor of that shape, a file, or a PIL picture.
        model: The network that will see them.

    Raises:
        TypeError: It is a tensor that is not floating.
        ValueError: It is a tensor of another shape, or a file that cannot be read.
    """
    pictures = check_images(target if isinstance(target, Tensor) else open_picture(target, "target"), "target")
    weight = next(iter(getattr(model, "parameters", list)()), pictures)
    return pictures.to(weight.device)


def size_of(processor: Any) -> int | None:
    """Returns the side of the square that a processor makes, or None if it does not say."""
    for name in ("crop_size", "size"):
        value: Any = getattr(processor, name, None)
        if isinstance(value, int):
            return value
        for side in ("height", "shortest_edge"):
            found = value.get(side) if isinstance(value, Mapping) else getattr(value, side, None)
            if found:
                return int(found)
    return None


def load_processor(source: str) -> Any:
    """Returns the image processor of a folder or a hub id, or None if there is none."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):
        return None
