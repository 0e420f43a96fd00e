"""Checks of `optimize`'s arguments, and arguments that go on working under their former names."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
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
    """Raises TypeError, naming the argument, for a chain, decoder, loss or callback that cannot be called."""
    hints = {
        "chain": (chain, "a function (x, y) -> (x0, y0)", "pass a doodl_fast.EDICT, for instance"),
        "decode": (
            decode,
            "a function from latents to images",
            "pass doodl_fast.Decoder(pipe.vae), or `lambda latents: latents` for a loss on the latents themselves",
        ),
        "loss": (
            loss,
            "a function from images to a scalar tensor",
            "pass a guide of doodl_fast.guidance, for instance",
        ),
    }
    if callback is not None:
        hints["callback_on_step_end"] = (callback, "a function of one StepInfo, or None", "pass a function")
    for name, (value, expected, hint) in hints.items():
        if not callable(value):
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}; {hint}")


def check_steps(count: Any) -> None:
    """Raises ValueError for a number of optimisation steps that is not a positive int."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_optimization_steps: expected an int of at least 1, got {count!r}")


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
