"""Checks of `optimize`'s arguments, and arguments that go on working under their former names."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .result import Pair

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed_arguments(**names: str) -> Callable[[Function], Function]:
    """Makes a function accept keyword arguments under former names, with a DeprecationWarning.

    Args:
        names: ``former="new"`` for every renamed argument.

    Returns:
        A decorator. The decorated function raises TypeError when it gets both names of an argument.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{old}: expected only {new}=, its new name, got both; pass {new}= alone")
                warnings.warn(
                    f"the argument {old} is now called {new}; the old name will go in version 0.3",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def check_functions(chain: Any, decode: Any, loss: Any, callback: Any) -> None:
    """Raises TypeError, naming the argument, for a chain, decoder, loss or callback that cannot be called.

    Several losses are checked by `Losses.of`.
    """
    hints = {
        "chain": (chain, "a function (x, y) -> (x0, y0)", "pass a doodl_fast.EDICT, for instance"),
    }
    if decode is not None:
        hints["decode"] = (
            decode,
            "a function from latents to images, or None",
            "pass doodl_fast.Decoder(pipe.vae), or None for a loss on the latents themselves",
        )
    if not isinstance(loss, (Mapping, list, tuple)):
        hints["loss"] = (
            loss,
            "a function from images to a scalar tensor, or a list or dict of them",
            "pass a guide of doodl_fast.guidance, for instance",
        )
    if callback is not None:
        hints["callback_on_step_end"] = (callback, "a function of one StepInfo, or None", "pass a function")
    for name, (value, expected, hint) in hints.items():
        if not callable(value):
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}; {hint}")


def check_steps(count: Any) -> None:
    """Raises ValueError for a number of optimisation steps that is not a positive int."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_optimization_steps: expected an int of at least 1, got {count!r}")


def check_stopping(patience: Any, min_delta: Any, best_of: Any) -> None:
    """Raises ValueError, naming the argument, for an end or a number of starts that cannot be."""
    for name, value in (("patience", patience), ("best_of", best_of)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or not 0 <= min_delta < float("inf"):
        raise ValueError(f"min_delta: expected a finite number of at least 0, got {min_delta!r}")


def check_randomness(seed: Any, generator: Any) -> None:
    """Raises TypeError or ValueError for a seed or a generator that PyTorch does not take."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits, got {seed}")


def check_path(name: str, value: Any) -> None:
    """Raises TypeError or ValueError, naming the argument, for what is no path of a folder; None and bools pass.

    An empty text would be the current folder, which nobody means.
    """
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name}: expected the path of a folder, got {type(value).__name__}")
    if not str(value):
        raise ValueError(f"{name}: expected the path of a folder, got an empty text; use '.' for the current folder")


def as_pair(latents: Tensor | Pair) -> Pair:
    """The latents (x, y) of the argument `latents`, checked."""
    given: Any = (latents, latents) if isinstance(latents, Tensor) else latents
    pair = tuple(given) if isinstance(given, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(z, Tensor) and z.is_floating_point() for z in pair):
        raise TypeError(f"latents: expected a floating tensor or a pair of them, got {type(latents).__name__}")
    x, y = pair
    if x.ndim < 2 or x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            "latents: expected (B, C, ...) tensors, alike in shape, dtype and device, got "
            f"{tuple(x.shape)} {x.dtype} {x.device} and {tuple(y.shape)} {y.dtype} {y.device}"
        )
    if not all(bool(torch.isfinite(z).all()) for z in pair):
        raise ValueError("latents: expected finite values, got NaN or Inf")
    return x, y
