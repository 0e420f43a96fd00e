"""Programs: lists of instructions on a few values, most often a pair.

A solver is a list of `Coupling`s, built once, in plain Python floats. Nothing here knows tensors, networks or
diffusion. The two-variable form is that of reversible residual networks (Gomez et al., arXiv 1707.04585) and, for
diffusion, of EDICT (Wallace et al., arXiv 2211.12446). Samplers that remember earlier steps, or that add noise, use
more than two values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Coupling:
    """One instruction: `target <- a * target + c * source + b * f(source, tag)`, on two of the values of a program.

    Args:
        target: The index of the value that is changed, an int of at least 0.
        a: A finite number. With `a = 0` the coupling forgets its target, so it cannot be undone.
        c: A finite number.
        b: A finite number. With `b = 0` the function f is never evaluated.
        step: Which step of the solver the coupling belongs to. An engine may store its state between steps.
        tag: Handed to f as it is, a timestep for instance.
        source: The index of the value that is read and left as it is, another one than the target. None means the
            other one of a pair: 1 for target 0, and 0 for target 1.

    Raises:
        ValueError: An index is not usable, or a coefficient is not finite.
    """

    target: int
    a: float = 1.0
    c: float = 0.0
    b: float = 0.0
    step: int = 0
    tag: Any = None
    source: int = field(default=None, repr=False)  # type: ignore[assignment]  # an int once the coupling is made

    def __post_init__(self) -> None:
        if self.source is None:
            if self.target not in (0, 1):
                raise ValueError(f"target: expected 0 or 1, got {self.target!r}; any other needs a source beside it")
            object.__setattr__(self, "source", 1 - self.target)
        for name, index in (("target", self.target), ("source", self.source)):
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise ValueError(f"{name}: expected an int of at least 0, got {index!r}")
        if self.source == self.target:
            raise ValueError(f"source: expected another value than the target, got {self.source} for both")
        if not all(math.isfinite(value) for value in (self.a, self.c, self.b)):
            raise ValueError(f"coefficients must be finite, got a={self.a}, c={self.c}, b={self.b}")

    @property
    def calls_network(self) -> bool:
        """Whether f is evaluated at all."""
        return self.b != 0

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes: `a = 1`, `c = b = 0`."""
        return self.a == 1 and self.c == 0 and self.b == 0

    @property
    def is_invertible(self) -> bool:
        """Whether the coupling can be undone: a coupling with `a = 0` forgets its target."""
        return self.a != 0

    def inverse(self) -> Coupling:
        """The coupling that undoes this one. It evaluates f at the same point, as the source is unchanged.

        Raises:
            ValueError: `a` is zero.
        """
        if not self.is_invertible:
            raise ValueError(f"a must not be zero: the coupling of step {self.step} forgets its target")
        c, b = -self.c / self.a, -self.b / self.a
        return Coupling(self.target, 1 / self.a, c, b, self.step, self.tag, self.source)


Program = tuple[Coupling, ...]


def compact(couplings: Iterable[Coupling]) -> Program:
    """The program without its exact no-ops (the last DDIM step at t = 0 has a = 1, b = 0, for instance)."""
    return tuple(coupling for coupling in couplings if not coupling.is_identity)


def invert(program: Iterable[Coupling]) -> Program:
    """The program that undoes `program`: inverse couplings in reverse order."""
    return tuple(coupling.inverse() for coupling in reversed(tuple(program)))


def is_invertible(program: Iterable[Coupling]) -> bool:
    """Whether every coupling of the program can be undone."""
    return all(coupling.is_invertible for coupling in program)


def num_values(program: Iterable[Coupling]) -> int:
    """How many values the program works on, at least 2."""
    return max([2, *(1 + max(coupling.target, coupling.source) for coupling in program)])


def count_network_calls(program: Iterable[Coupling]) -> int:
    """How often f is evaluated in one run."""
    return sum(coupling.calls_network for coupling in program)


def step_boundaries(program: Program, every: int) -> frozenset[int]:
    """Positions (numbers of couplings done) after every `every`-th step, the program's end always among them.

    Raises ValueError when `every` is below 1.
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    ends = [position for position in range(1, len(program)) if program[position - 1].step != program[position].step]
    return frozenset(ends[every - 1 :: every]) | {len(program)}
