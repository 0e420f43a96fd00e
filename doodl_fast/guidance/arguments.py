"""Checks of the arguments that several guides have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any


def check_count(value: Any, name: str, least: int) -> int:
    """Returns an int that is at least `least`. Raises ValueError, naming the argument, for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
    return value


def check_positive(value: Any, name: str) -> float:
    """Returns a finite positive number. Raises ValueError, naming the argument, for anything else."""
    if not is_finite(value) or not value > 0:
        raise ValueError(f"{name}: expected a positive number that is finite, got {value!r}")
    return float(value)


def check_channels(values: Sequence[Any], name: str, positive: bool = False) -> tuple[float, ...]:
    """Returns three finite numbers, one for each color channel. Raises ValueError, naming the argument, otherwise."""
    numbers = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    if len(numbers) != 3 or not all(is_finite(value) and (value > 0 or not positive) for value in numbers):
        kind = "positive finite" if positive else "finite"
        raise ValueError(f"{name}: expected three {kind} numbers, one for each color, got {values!r}")
    return tuple(map(float, numbers))


def checked_prompt(prompt: Any) -> tuple[str | tuple[str, ...], list[str]]:
    """Returns one text, or a tuple of texts, and both as a list. Raises ValueError if there is none or one is empty."""
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"prompt: expected a text, or a text for each picture, got {prompt!r}")
    return prompt if isinstance(prompt, str) else tuple(texts), texts


def check_texts(texts: int, pictures: int) -> None:
    """Raises ValueError unless there is one text for all pictures, or one for each.

    Args:
        texts: How many there are.
        pictures: How many there are.
    """
    if texts not in (1, pictures):
        raise ValueError(f"prompt: expected 1 text or {pictures}, one for each picture, got {texts}")


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number; True and False are not numbers here."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
