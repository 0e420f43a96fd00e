"""`Segmentation` and `Depth`: guidance to what a network says of every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain.host_reads import check_later
from ..diffusion.networks import check_source, loading
from ..frozen import Level, level_of
from .classifier import find_label
from .masks import KINDS, OTHERS, has_masks, mask_logits
from .model_loading import load_model
from .view import View, load_processor, run_network, target_pictures

UNCOUNTED = -1
"""What marks pixels of a map of classes that do not count."""


def load_dense(
    kind: str, source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Loads a network for every pixel from safetensors files.

    Args:
        kind: "segmentation" or "depth".
        source: A folder or a hub id.
        device: Where the model is put.
        dtype: The dtype of its weights.

    Returns:
        The transformers model in eval mode, and its image processor, or None if it was saved without one.

    Raises:
        ValueError: There is none, or some of its weights are missing.
    """
    import transformers

    if kind == "depth":
        loader: Any = transformers.AutoModelForDepthEstimation
    else:
        name = check_source(source, "config.json", "guidance model")
        with loading(name, "guidance model"):
            config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type in OTHERS:
            raise ValueError(
                f"guidance model: expected one that gives every pixel of a picture a class, got {name!r}, a "
                f"{config.model_type}: {OTHERS[config.model_type]}"
            )
        universal = config.model_type in KINDS
        names = "AutoModelForUniversalSegmentation", "AutoModelForSemanticSegmentation"
        loader = getattr(transformers, names[0] if universal else names[1])
    model, name = load_model(loader, source, dtype)
    return model.to(device), load_processor(name)


class _Dense:
    """What both guides share: the network, its view of pictures, and the part of them that counts.

    Pictures are resized to the network's square, whatever their shape, so that all of them is seen.
    """

    output = ""
    """The attribute of a transformers output that holds the maps."""

    def __init__(self, model: Any, processor: Any, region: Tensor | None, options: dict[str, Any], lean: Level) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a network that is called with pictures, got {type(model).__name__}")
        self.model, self.lean = model, lean
        self.view = View.of(model, processor, fit="squeeze", **options)
        self.region = None if region is None else _as_maps(region, "region", torch.float32).clamp(0, 1)

    def maps(self, images: Tensor) -> Tensor:
        """Computes what the network says of images (B, 3, H, W) in [-1, 1], in its own size."""
        return run_network(self.model, self.view(images), self._pick, self.lean)

    def _pick(self, output: Any) -> Tensor:
        found = output[0] if isinstance(output, tuple) else output
        found = found if isinstance(found, Tensor) else getattr(found, self.output, None)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"model: expected a network that returns a tensor, or {self.output!r}, got {type(output).__name__}"
            )
        return found

    def _weights(self, pixels: Tensor) -> Tensor:
        """How much each pixel of maps (B, h, w) counts, (B, h, w): their region, resized."""
        if self.region is None:
            return torch.ones_like(pixels)
        _check_count(self.region, pixels, "region")
        region = F.interpolate(self.region.to(pixels)[:, None], pixels.shape[-2:], mode="area")[:, 0]
        return region.expand_as(pixels)

    def _mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """The weighted mean over all pixels."""
        total = weights.sum()
        check_later(total, _check_counted)
        return (values * weights).sum() / total

    def _looked_at(self, target: Any) -> Tensor:
        """What the network says of target pictures."""
        with torch.no_grad():
            return self.maps(target_pictures(target, self.model)).detach()


class Segmentation(_Dense):
    """The cross-entropy between a network's classes of pixels and those that are asked for, as a mean over pixels.

    The network is called in its own dtype, in eval mode and without gradients of its weights, and is not changed.

    Args:
        model: A transformers model for semantic segmentation, or one that returns masks and a class for each of them
            (MaskFormer, Mask2Former, EoMT; see `masks.mask_logits`). Or any callable from pixels (N, 3, h, w) to logits
            (N, classes, rows, columns), to an object that has them as `.logits`, or to a tuple that begins with them.
        target: What pixels shall show. A class, by its index or its name in the model's config; or a tensor of ints
            (H, W) or (1 or B, H, W), the class of each pixel, where -1 is for pixels that do not count; or pictures, a
            floating tensor (1 or B, 3, H, W) in [-1, 1], a pathlib.Path of a file, or a PIL picture, of which the
            network's own classes are taken.
        processor: The model's image processor, or None.
        region: How much each pixel counts, from 0 to 1, of shape (H, W) or (1 or B, H, W); None for all the same.
        mean: Three numbers that are subtracted from pixels in [0, 1]. By default those of the processor, else 0.5.
        std: Three positive numbers that pixels are divided by then. By default those of the processor, else 0.5.
        size: The side of the square, in pixels, to which pictures are resized. By default that of the processor, else
            that of the config, else pictures keep their size.
        lean: Whether graphs keep no more than the gradient needs, to the same bits (docs/lean.md).

    Raises:
        TypeError: `model` cannot be called, or returns no logits.
        ValueError: There is no such class, or another argument is out of range.

    Example:
        >>> left = torch.zeros(512, 512)
        >>> left[:, :256] = 1
        >>> loss = Segmentation.from_pretrained("nvidia/segformer-b0-finetuned-ade-512-512", "tree", region=left)
    """

    output = "logits"

    def _pick(self, output: Any) -> Tensor:
        found = mask_logits(output) if has_masks(output) else super()._pick(output)
        if found.ndim != 4:
            raise TypeError(
                f"model: expected logits (N, classes, rows, columns), got shape {tuple(found.shape)} of "
                f"{type(self.model).__name__}"
            )
        return found

    def __init__(
        self,
        model: Any,
        target: int | str | Tensor | Path | Any,
        processor: Any = None,
        region: Tensor | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
        lean: bool | str = True,
    ) -> None:
        super().__init__(model, processor, region, {"mean": mean, "std": std, "size": size}, level_of(lean))
        self.classes: Tensor | None = None
        self.label: int | None = None
        if isinstance(target, (int, str)):
            self.label = find_label(target, getattr(getattr(model, "config", None), "id2label", None) or {})
        elif isinstance(target, Tensor) and not target.is_floating_point():
            self.classes = _as_maps(target, "target", torch.long)
        else:
            self.classes = self._looked_at(target).argmax(1)
        # It is read here, once, as a GPU would wait for it in every step.
        self.largest = self.label if self.classes is None else int(self.classes.max())

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: There are no such classes, several targets or regions, and not as many as pictures, or no pixel
                counts.
        """
        logits = self.maps(images)
        if self.classes is None:
            assert self.label is not None
            classes = torch.full_like(logits[:, 0], self.label, dtype=torch.long)
        else:
            _check_count(self.classes, logits, "target")
            classes = self.classes.to(logits.device).expand(len(logits), -1, -1)
            if classes.shape[-2:] != logits.shape[-2:]:
                logits = F.interpolate(logits, classes.shape[-2:], mode="bilinear", align_corners=False)
        assert self.largest is not None
        if self.largest >= logits.shape[1]:
            raise ValueError(
                f"target: expected classes below {logits.shape[1]}, got {self.largest}; mark pixels that do not count "
                f"by {UNCOUNTED}"
            )
        counted = classes >= 0
        values = F.cross_entropy(logits, classes.clamp(min=0), reduction="none")
        return self._mean(values, self._weights(values) * counted)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        target: int | str | Tensor | Path | Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Segmentation:
        """Loads the model from a folder or a hub id, as transformers' class for semantic segmentation or for masks.

        Args:
            source: The folder or the hub id.
            target: What pixels shall show.
            device: Where the model is put.
            dtype: The dtype of its weights.
            **options: `region`, `mean`, `std`, `size` and `lean`.

        Raises:
            ValueError: There is no such model or class, or the model lacks weights.
        """
        model, processor = load_dense("segmentation", source, device, dtype)
        return cls(model, target, processor, **options)


class Depth(_Dense):
    """The mean difference between a network's depth of pixels and that which is asked for.

    Networks for relative depth give it up to a scale and a shift (Ranftl et al., arXiv 1907.01341). So by default the
    median of each map is subtracted, and the mean distance from it divided by, before maps are compared.

    The network is called in its own dtype, in eval mode and without gradients of its weights, and is not changed.

    Args:
        model: A transformers model for depth estimation, or any callable from pixels (N, 3, h, w) to depths (N, rows,
            columns), to an object that has them as `.predicted_depth`, or to a tuple that begins with them.
        target: The depths that are asked for, as the network gives them: a floating tensor (H, W) or (1 or B, H, W); or
            pictures, a tensor (1 or B, 3, H, W) in [-1, 1], a file, or a PIL picture, whose depths the network says.
        processor: The model's image processor, or None.
        region: How much each pixel counts, from 0 to 1, of shape (H, W) or (1 or B, H, W); None for all the same. It
            counts for the median too, which leaves out pixels below half of the largest.
        relative: Whether depths are compared up to a scale and a shift; False for networks of metric depth.
        mean: Three numbers that are subtracted from pixels in [0, 1]. By default those of the processor, else 0.5.
        std: Three positive numbers that pixels are divided by then. By default those of the processor, else 0.5.
        size: The side of the square, in pixels, to which pictures are resized. By default that of the processor, else
            that of the config, else pictures keep their size.
        lean: Whether graphs keep no more than the gradient needs, to the same bits (docs/lean.md).

    Raises:
        TypeError: `model` cannot be called, or returns no depths.
        ValueError: An argument is out of range.

    Example:
        >>> loss = Depth.from_pretrained("depth-anything/Depth-Anything-V2-Small-hf", "room.png")
    """

    output = "predicted_depth"

    def __init__(
        self,
        model: Any,
        target: Tensor | str | Path | Any,
        processor: Any = None,
        region: Tensor | None = None,
        *,
        relative: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
        lean: bool | str = True,
    ) -> None:
        super().__init__(model, processor, region, {"mean": mean, "std": std, "size": size}, level_of(lean))
        self.relative = relative
        is_map = isinstance(target, Tensor) and target.ndim < 4
        self.depths = _as_maps(target, "target", torch.float32) if is_map else self._looked_at(target)

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: There are several targets or regions, and not as many as pictures, or no pixel counts.
        """
        depths = self.maps(images)
        _check_count(self.depths, depths, "target")
        target = self.depths.to(depths)
        if target.shape[-2:] != depths.shape[-2:]:
            target = F.interpolate(target[:, None], depths.shape[-2:], mode="bilinear", antialias=True)[:, 0]
        weights, target = self._weights(depths), target.expand_as(depths)
        if self.relative:
            depths, target = _relative(depths, weights), _relative(target, weights)
        return self._mean((depths - target).abs(), weights)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        target: Tensor | str | Path | Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Depth:
        """Loads the model from a folder or a hub id, with the class of transformers for depth estimation.

        Args:
            source: The folder or the hub id.
            target: The depths that are asked for.
            device: Where the model is put.
            dtype: The dtype of its weights.
            **options: `region`, `relative`, `mean`, `std`, `size` and `lean`.

        Raises:
            ValueError: There is no such model, or it lacks weights.
        """
        model, processor = load_dense("depth", source, device, dtype)
        return cls(model, target, processor, **options)


def _as_maps(values: Any, name: str, dtype: torch.dtype) -> Tensor:
    """A copy of maps (H, W) or (B, H, W), as (B, H, W)."""
    if not isinstance(values, Tensor) or values.ndim not in (2, 3) or not values.numel():
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name}: expected a tensor of shape (H, W) or (B, H, W), got {got}")
    return values.detach().to(dtype, copy=True).reshape(-1, *values.shape[-2:])


def _check_counted(total: list[float]) -> None:
    """Raises ValueError unless the sum of all weights is positive."""
    if not total[0] > 0:
        raise ValueError("region: expected some pixels that count, got none")


def _check_count(maps: Tensor, pictures: Tensor, name: str) -> None:
    """Raises ValueError unless there is one map for all pictures, or one for each."""
    if len(maps) not in (1, len(pictures)):
        raise ValueError(f"{name}: expected 1 map or {len(pictures)}, one for each picture, got {len(maps)} of them")


def _relative(depths: Tensor, weights: Tensor) -> Tensor:
    """Depths (B, h, w) without scale and shift: the distance to the median, in units of its mean over the region."""
    flat, counts = depths.flatten(1), weights.flatten(1)
    inside = flat.detach().masked_fill(counts < counts.amax(1, keepdim=True) / 2, torch.nan)
    # The median is one of the values, whose gradient counts.
    place = inside.nanmedian(1).indices
    centered = flat - flat.gather(1, place[:, None])
    spread = (centered.abs() * counts).sum(1) / counts.sum(1).clamp(min=torch.finfo(flat.dtype).tiny)
    return (centered / spread.clamp(min=1e-6)[:, None]).view_as(depths)
