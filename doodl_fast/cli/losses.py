"""The losses of a command line: guides with weights, and functions of the user's own modules."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def weighted(names: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of some names, or a name and a weight, as in clip-text:0.5."""

    def parse(value: str) -> str:
        name, separator, weight = value.partition(":")
        if name not in names:
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(names)})")
        if separator:
            _weight(weight)
        return value

    return parse


def own_loss(value: str) -> str:
    """An argparse type: module:function or module:function:weight."""
    parts = value.split(":")
    if len(parts) not in (2, 3) or not all(part.strip() for part in parts):
        raise argparse.ArgumentTypeError(f"expected MODULE:FUNCTION or MODULE:FUNCTION:WEIGHT, got {value!r}")
    if len(parts) == 3:
        _weight(parts[2])
    return value


def _weight(text: str) -> float:
    """A finite number in ASCII digits."""
    try:
        number = float(text) if text.isascii() else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number as the weight, got {text!r}")
    return number


def guide_names(args: argparse.Namespace) -> list[str]:
    """The names of the guides, without their weights."""
    given = [args.guidance] if isinstance(args.guidance, str) else args.guidance or []
    return [entry.partition(":")[0] for entry in given]


def make_losses(
    args: argparse.Namespace, guides: dict[str, Callable[..., Any]], device: torch.device, dtype: torch.dtype
) -> Any:
    """The loss that --guidance and --loss describe: one function, or a dict of functions with weights.

    Args:
        args: The command line.
        guides: By name what makes each guide.
        device: Of the guides' networks.
        dtype: Of them.

    Raises:
        ValueError: A module or a function of --loss cannot be found.
    """
    given = [args.guidance] if isinstance(args.guidance, str) else args.guidance or []
    losses: dict[str, Any] = {}
    for entry in given:
        name, _, weight = entry.partition(":")
        losses[name] = (guides[name](args, device, dtype), _weight(weight) if weight else 1.0)
    for entry in args.loss or []:
        module, function, *weights = entry.split(":")
        losses[f"{module}:{function}"] = (load_function(module, function), _weight(weights[0]) if weights else 1.0)
    (first, weight), *rest = losses.values()
    return first if not rest and weight == 1 else losses


def load_function(module: str, function: str) -> Callable[..., Any]:
    """Imports a function of a module that Python finds from the current folder, too.

    Raises:
        ValueError: There is no such module or function, or it cannot be called.
    """
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise ValueError(f"--loss: cannot import {module!r} from {here!r} ({error})") from error
    except AttributeError as error:
        raise ValueError(f"--loss: expected a function {function!r} in the module {module!r} ({error})") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise ValueError(f"--loss: expected a function, got {module}:{function}, a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def find_optimizer(name: str | None, rate: float | None) -> Callable[..., Any] | None:
    """The optimizer that --optimizer names, with the learning rate --lr.

    Raises:
        ValueError: torch.optim has no such optimizer, or --lr is given without one.
    """
    if name is None:
        if rate is not None:
            raise ValueError("--lr: expected --optimizer with it, got none; --grad-scale scales the built-in update")
        return None
    import torch

    kinds = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    kind = kinds.get(name.lower())
    if kind is None:
        known = ", ".join(sorted(value.__name__ for value in kinds.values()))
        raise ValueError(f"--optimizer: expected one of {known}, got {name!r}")
    if rate is not None and not rate > 0:
        raise ValueError(f"--lr: expected a positive number, got {rate}")
    options: dict[str, Any] = {} if rate is None else {"lr": rate}
    return lambda parameters: kind(parameters, **options)
