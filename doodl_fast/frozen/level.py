"""How lean a frozen network's graph is."""

from __future__ import annotations

import enum
from typing import Any

SMALL = 2**12
"""Convolutions and projections of inputs of fewer elements are those of PyTorch with lean=True. A lean layer takes some
20 to 100 microseconds of Python, beside kernels that are as fast, and would save some KiB."""
SMALL_NORM = 2 * SMALL
"""The same for inputs of GroupNorm. A lean one saves less, as the layer before it often keeps its input anyway."""
SMALL_QUERY = 8 * SMALL
"""The same for inputs of attention, whose output alone is saved, and which costs the most Python."""


class Level(enum.IntEnum):
    """What a graph leaves out, and what its gradient computes again for that.

    Attributes:
        OFF: Nothing: layers are those of PyTorch.
        ON: What the input's gradient does not need, or what cheap operators make of something that is kept anyway; but
            for tensors so small that Python takes longer than their kernels.
        RECOMPUTE: Also what one matrix product makes of something that is kept anyway, in feed-forward and attention
            layers.
    """

    OFF = 0
    ON = 1
    RECOMPUTE = 2


def level_of(lean: Any) -> Level:
    """Reads the argument `lean` of a public function: False, True or "recompute", or a `Level`.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(lean, Level):
        return lean
    if isinstance(lean, bool):
        return Level.ON if lean else Level.OFF
    if lean == "recompute":
        return Level.RECOMPUTE
    raise ValueError(f'lean: expected True, False or "recompute", got {lean!r}')
