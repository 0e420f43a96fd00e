"""Reads the steps of any linear diffusers scheduler off the scheduler itself, as plain numbers.

A scheduler's `step` is, for almost every scheduler, a linear function of the latents, of the network's outputs so far
and of the noise that it draws. So it is called once with unit vectors in their place, and what comes out are the
coefficients: no formula of any sampler is repeated here.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor


class Term(NamedTuple):
    """One quantity that a step may depend on.

    Attributes:
        kind: "latents" at the start of a step, the network's "output" in it, or the "noise" that it draws.
        number: Of the step, or of the noise in the order of drawing.
    """

    kind: Literal["latents", "output", "noise"]
    number: int


@dataclass(frozen=True)
class LinearStep:
    """One step of a scheduler.

    Attributes:
        timestep: What the network is given, an int or a float as the scheduler has it.
        input_scale: The network is evaluated at `input_scale * latents`.
        result: The next latents, as coefficients of the terms that they are made of.
    """

    timestep: int | float
    input_scale: float
    result: Mapping[Term, float]


def trace_scheduler(scheduler: Any, num_inference_steps: int, **set_timesteps: Any) -> list[LinearStep]:
    """The steps that a diffusers scheduler takes, in order.

    Args:
        scheduler: A diffusers scheduler. It is copied and never changed.
        num_inference_steps: As in `scheduler.set_timesteps`.
        **set_timesteps: Passed to `scheduler.set_timesteps`, `mu` of a flow scheduler for instance.

    Returns:
        One entry for each network call. Schedulers of higher order make several calls for one step.

    Raises:
        ValueError: A step is not linear (thresholding or clipping of the predicted picture), or the scheduler draws
            noise in a way that cannot be followed.
    """
    name = type(scheduler).__name__
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, **set_timesteps)
    timesteps = list(scheduler.timesteps)
    basis = _Basis(len(timesteps))
    steps: list[LinearStep] = []
    with torch.no_grad(), _noise_drawn_from(scheduler, basis):
        for index, timestep in enumerate(timesteps):
            latents, output = basis.vector(Term("latents", index)), basis.vector(Term("output", index))
            scale = getattr(scheduler, "scale_model_input", None)
            network_input = latents if scale is None else scale(latents, timestep)
            result = scheduler.step(output, timestep, latents, return_dict=False)[0]
            steps.append(
                LinearStep(
                    timestep=_number(timestep),
                    input_scale=basis.read(network_input)[Term("latents", index)],
                    result=basis.read(result),
                )
            )
    if not basis.nothing_clipped:
        raise ValueError(f"scheduler: the steps of {name} are not linear")
    return steps


class _Basis:
    """Unit vectors that stand for the terms, as latents of shape (1, terms, 1, 1)."""

    def __init__(self, steps: int) -> None:
        self._steps, self._drawn = steps, 0
        self.nothing_clipped = True

    def _position(self, term: Term) -> int:
        return ("latents", "output", "noise").index(term.kind) * self._steps + term.number

    def vector(self, term: Term, dtype: torch.dtype = torch.float64) -> Tensor:
        vector = torch.zeros(1, 4 * self._steps, 1, 1, dtype=dtype)
        vector[0, self._position(term)] = 1
        return vector

    def noise(self, dtype: torch.dtype | None) -> Tensor:
        self._drawn += 1
        return self.vector(Term("noise", self._drawn - 1), dtype or torch.float32)

    def read(self, value: Tensor) -> dict[Term, float]:
        """The coefficients of a linear combination of the vectors."""
        found: dict[Term, float] = {}
        for position, coefficient in enumerate(value.flatten().double().tolist()):
            if coefficient:
                kinds: tuple[Literal["latents", "output", "noise"], ...] = ("latents", "output", "noise", "noise")
                kind = kinds[position // self._steps]
                index = position % self._steps + (self._steps if position >= 3 * self._steps else 0)
                found[Term(kind, index)] = coefficient
        return found


@contextlib.contextmanager
def _noise_drawn_from(scheduler: Any, basis: _Basis) -> Iterator[None]:
    """For its duration the scheduler's own draws of noise give the basis's vectors."""

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
        return basis.noise(dtype)

    with contextlib.ExitStack() as stack:
        for cls in type(scheduler).__mro__:
            module = sys.modules.get(cls.__module__)
            if module is not None and "randn_tensor" in vars(module):
                stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield


def _number(timestep: Any) -> int | float:
    value = timestep.item() if isinstance(timestep, Tensor) else timestep
    return int(value) if float(value).is_integer() else float(value)
