"""Truncated gradients: those that go through the network in the last steps of a chain alone."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..chain.chain import Chain
from ..chain.program import Coupling, Program, num_values


class Truncation(ABC):
    """A gradient that is cheaper than the chain's own and differs from it. The latents that come out do not differ.

    It is an option of every chain in floating point, see `DiffusionChain.last_steps`.
    """

    @abstractmethod
    def run(self, chain: Chain, schedule: Any, latents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs a chain's program with the truncated gradient.

        Args:
            chain: A chain in floating point.
            schedule: That of the solver.
            latents: One for each value of the program.
        """

    def check(self, chain: Chain, schedule: Any) -> None:  # noqa: B027 - most truncations fit every chain
        """Raises ValueError if the gradient of this chain cannot be truncated so. Arguments are as in `run`."""


@dataclass
class LastSteps(Truncation):
    """In how many of the last steps the gradient goes through the network (as DRaFT-K does, arXiv 2309.17400).

    In the steps before, the network's outputs count as constants: the gradient passes them by their linear part alone.
    So these steps cost one evaluation and keep nothing, and the gradient is not the whole one. Conditions of the
    network get no gradient from them.

    Args:
        least: The number of steps, or the least one if it is drawn.
        most: If it is given, every run draws its number of steps between `least` and `most`, both included.
        seed: Of the draws.

    Raises:
        ValueError: A number is below 1, or `most` is below `least`.

    Example:
        >>> chain.last_steps = LastSteps(5)
    """

    least: int
    most: int | None = None
    seed: int = 0
    _random: random.Random = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("least", self.least), ("most", self.least if self.most is None else self.most)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most: expected at least {self.least}, which is `least`, got {self.most}")
        self._random = random.Random(self.seed)

    def draw(self) -> int:
        """The number of steps of the next run."""
        return self.least if self.most is None else self._random.randint(self.least, self.most)

    def run(self, chain: Chain, schedule: Any, latents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs the program. Where the last steps begin, the latents are rounded to their dtype once more."""
        head, tail = split(chain.program, self.draw())
        return run_part(chain, tail, run_constant(chain, head, latents), chain.memory)


def split(program: Program, steps: int) -> tuple[Program, Program]:
    """Divides a program where its last steps begin. If it has no more than these, the first part is empty."""
    numbers = sorted({coupling.step for coupling in program})
    first = numbers[max(0, len(numbers) - steps)] if numbers else 0
    head = tuple(coupling for coupling in program if coupling.step < first)
    return head, tuple(coupling for coupling in program if coupling.step >= first)


def run_constant(chain: Chain, program: Program, latents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Runs a part of a chain's program with the gradient that it has if the network's outputs are constants."""
    if not program:
        return latents
    with torch.no_grad():
        values = run_part(chain, program, tuple(latent.detach() for latent in latents), "checkpoint")
    return with_linear_gradient(program, latents, values)


def run_part(chain: Chain, program: Program, latents: tuple[Tensor, ...], memory: object) -> tuple[Tensor, ...]:
    """Runs a part of a chain's program, which may leave the last ones of the latents alone."""
    part = Chain(chain.evaluator, program, memory, state_dtype=chain.state_dtype)  # type: ignore[arg-type]
    count = num_values(program)
    return (*part.run(*latents[:count]), *latents[count:])


def with_linear_gradient(
    program: Sequence[Coupling], start: Sequence[Tensor], values: Sequence[Tensor], output: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The values that a program leads to, with the gradient that it has for given gradients of the network's outputs.

    Args:
        program: The couplings.
        start: The latents that it began with.
        values: What they have become.
        output: Every output of the network gets the gradient of this tensor. None: the outputs are constants.
    """
    inputs = [*start, *([] if output is None else [output])]
    rows = [[float(i == j) for j in range(len(inputs))] for i in range(len(start))]
    for k in program:
        rows[k.target] = [k.a * t + k.c * s for t, s in zip(rows[k.target], rows[k.source], strict=True)]
        if output is not None:
            rows[k.target][-1] += k.b
    results = []
    for row, value in zip(rows, values, strict=True):
        linear = [share * tensor for share, tensor in zip(row, inputs, strict=True) if share]
        total = torch.stack(linear or [0 * start[0]]).sum(0)
        results.append(value + (total - total.detach()))
    return tuple(results)
