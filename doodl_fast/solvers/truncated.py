"""Truncated gradients: those that go through the network in the last steps of a chain alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..chain.chain import Chain
from ..chain.program import Coupling, Program, num_values


@dataclass
class LastSteps:
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


def run_truncated(chain: Chain, latents: tuple[Tensor, ...], steps: int) -> tuple[Tensor, ...]:
    """Runs a chain's program with a gradient that goes through the network in the last steps alone.

    The values are those of the chain, but that the latents are rounded to their dtype once more, where the last steps
    begin.

    Args:
        chain: A chain in floating point.
        latents: One for each value of the program.
        steps: How many of the last steps.
    """
    numbers = sorted({coupling.step for coupling in chain.program})
    first = numbers[max(0, len(numbers) - steps)] if numbers else 0
    head = tuple(coupling for coupling in chain.program if coupling.step < first)
    tail = tuple(coupling for coupling in chain.program if coupling.step >= first)
    if head:
        with torch.no_grad():
            values = _run(chain, head, tuple(latent.detach() for latent in latents), "checkpoint")
        latents = _with_linear_gradient(head, latents, values)
    return _run(chain, tail, latents, chain.memory)


def _run(chain: Chain, program: Program, latents: tuple[Tensor, ...], memory: object) -> tuple[Tensor, ...]:
    """Runs a part of a chain's program, which may leave the last ones of the latents alone."""
    part = Chain(chain.evaluator, program, memory, state_dtype=chain.state_dtype)  # type: ignore[arg-type]
    count = num_values(program)
    return (*part.run(*latents[:count]), *latents[count:])


def _with_linear_gradient(
    program: Sequence[Coupling], start: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The values, with the gradient of the program whose network outputs are constants."""
    rows = [[float(i == j) for j in range(len(start))] for i in range(len(start))]
    for k in program:
        rows[k.target] = [k.a * t + k.c * s for t, s in zip(rows[k.target], rows[k.source], strict=True)]
    results = []
    for row, value in zip(rows, values, strict=True):
        linear = [share * latent for share, latent in zip(row, start, strict=True) if share]
        total = torch.stack(linear or [0 * start[0]]).sum(0)
        results.append(value + (total - total.detach()))
    return tuple(results)
