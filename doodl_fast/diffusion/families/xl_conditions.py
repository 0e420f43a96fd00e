"""What SDXL's networks are told of a picture's size, crop and beauty (Podell et al., arXiv 2307.01952)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..guided import Guided
from .additions import Addition, Build
from .base import Request

SIZES = ("original_size", "crops_coords_top_left", "target_size")
SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}


class XLConditions(Addition):
    """SDXL's sizes and crops, and the aesthetic scores of its refiner."""

    options = frozenset({*SIZES, *(f"negative_{name}" for name in SIZES), *SCORES})

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        self._options, self._refines = options, _refines(pipe)
        self._pairs = {name: _pair(name, options[name]) for name in options if name not in SCORES}
        if self._refines and request.options.get("image") is None:
            raise ValueError(
                f"pipe: {type(pipe).__name__} is a refiner (requires_aesthetics_score), which starts from another "
                "model's picture and not from noise; pass image, with strength or denoising_start, or use the base "
                "model"
            )
        given = sorted(SCORES.keys() & options.keys())
        if given and not self._refines:
            raise ValueError(f"{given[0]}: expected None, because this model is no refiner (requires_aesthetics_score)")

    @classmethod
    def takes(cls, pipe: Any) -> frozenset[str]:
        """Returns those that the pipeline takes."""
        return cls.options & inspect.signature(type(pipe).__call__).parameters.keys()

    @classmethod
    def is_in(cls, pipe: Any) -> bool:
        """Whether the pipeline is one of SDXL."""
        return getattr(pipe, "text_encoder_2", None) is not None

    def add(self, build: Build) -> None:
        """Replaces the `time_ids` where they are not those of a picture of the chain's size."""
        if not self._options and not self._refines:
            return
        positive, negative = self._numbers(build)
        added = build.kwargs["added_cond_kwargs"]
        rows = [added["time_ids"].new_tensor([numbers], dtype=torch.float32) for numbers in (negative, positive)]
        build.kwargs["added_cond_kwargs"] = {**added, "time_ids": Guided(*rows) if build.guided else rows[1]}

    def _numbers(self, build: Build) -> tuple[list[float], list[float]]:
        """Returns the numbers for the prompt, and those for the negative prompt."""
        own, from_picture = (build.space.height, build.space.width), "strength" in _parameters(build.pipe)
        size, corner, target = (self._pairs.get(name) for name in SIZES)
        size, corner, target = size or own, corner or (0, 0), target or own
        negatives = [self._pairs.get(f"negative_{name}") for name in SIZES]
        if self._refines:
            scores = [self._options.get(name, SCORES[name]) for name in SCORES]
            negative_size, negative_corner = negatives[0] or size, negatives[1] or (0, 0)
            return [*size, *corner, scores[0]], [*negative_size, *negative_corner, scores[1]]
        positive: list[float] = [*size, *corner, *target]
        if from_picture:  # These pipelines use the corner of the prompt for both.
            return positive, [*(negatives[0] or size), *corner, *(negatives[2] or target)]
        if negatives[0] is None or negatives[2] is None:
            return positive, positive
        return positive, [*negatives[0], *(negatives[1] or (0, 0)), *negatives[2]]


def _refines(pipe: Any) -> bool:
    """Whether a pipeline's model is a refiner."""
    return bool(getattr(getattr(pipe, "config", None), "requires_aesthetics_score", False))


def _parameters(pipe: Any) -> Any:
    return inspect.signature(type(pipe).__call__).parameters


def _pair(name: str, value: Any) -> tuple[int, int] | None:
    """Returns an argument that is a height and a width, or None. Raises ValueError for anything else."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(isinstance(entry, int) for entry in value):
        raise ValueError(f"{name}: expected two ints, got {value!r}")
    return value[0], value[1]
