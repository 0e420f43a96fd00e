"""`@solver`: a class of chains from a function that turns a schedule into couplings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..chain.memory.strategies import Memory
from ..chain.program import Coupling
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import Schedule
from .base import DiffusionChain
from .single import SingleLatentChain

MakeProgram = Callable[..., Sequence[Coupling]]


def solver(make_program: MakeProgram | None = None, *, pair: bool = False) -> Any:
    """Decorator: makes a class of chains of a function from a `Schedule` to couplings.

    The class has the constructor `(denoiser, schedule, <options of the function>, memory=, state_dtype=, arithmetic=,
    drift_tolerance=, memory_budget=)`, and with it `from_pipeline`, `noise`, `decode`, gradients in every memory
    strategy, and, where no coupling has `a = 0`, the inverse and exact arithmetic.

    Args:
        make_program: A function whose first argument is the `Schedule`. Its other arguments become options of the
            class. Its couplings work on latents 0 and 1.
        pair: Whether both latents start from noise and both are pictures, as in `EDICT`. Otherwise latent 0 is the
            noise, latent 1 is zero at the start, and the latent that the last coupling changes is the picture.

    Returns:
        A subclass of `DiffusionChain`, of the function's name.

    Raises:
        TypeError: `make_program` takes no schedule, or an option has a name that the class uses itself.

    Example:
        >>> @doodl_fast.solver
        ... def Euler(schedule, strength=1.0):
        ...     ...
        ...     return couplings
        >>> chain = Euler.from_pipeline(pipe, "a dog", strength=0.5)
    """
    if make_program is None:
        return lambda function: solver(function, pair=pair)
    name = getattr(make_program, "__name__", "solver")
    parameters = list(inspect.signature(make_program).parameters.values())
    if not parameters:
        raise TypeError(f"make_program: expected a function of a schedule, got {name}(), which takes no argument")
    base: Any = DiffusionChain if pair else SingleLatentChain
    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters[1:]]
    signature = _constructor_signature(name, options)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        own = {option.name: arguments.pop(option.name) for option in options}
        arguments.pop("self")
        denoiser, schedule = arguments.pop("denoiser"), arguments.pop("schedule")
        base.__init__(self, denoiser, schedule, lambda levels: make_program(levels, **own), **arguments)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    namespace = {"__init__": __init__, "__doc__": make_program.__doc__, "__module__": make_program.__module__}
    return type(name, (base,), namespace)


def _constructor_signature(name: str, options: list[inspect.Parameter]) -> inspect.Signature:
    """The signature of the class's constructor: the usual one, with the function's options after the schedule."""

    def usual(
        self: Any,
        denoiser: Denoiser,
        schedule: Schedule,
        *,
        memory: Memory = "checkpoint",
        state_dtype: torch.dtype | None = None,
        arithmetic: str = "float",
        drift_tolerance: float | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        """Only its signature is used."""

    parameters = list(inspect.signature(usual).parameters.values())
    taken = {parameter.name for parameter in parameters}
    for option in options:
        if option.name in taken:
            raise TypeError(
                f"make_program: expected options of other names than the chain's own, got {option.name!r} of {name}"
            )
    return inspect.Signature([*parameters[:3], *options, *parameters[3:]])
