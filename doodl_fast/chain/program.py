"""Programs: lists of reversible instructions on a pair of values.

A solver is a list of `Coupling`s, built once, in plain Python floats. Nothing here knows tensors, networks or
diffusion. The two-variable form is that of reversible residual networks (Gomez et al., arXiv 1707.04585) and, for
diffusion, of EDICT (Wallace et al., arXiv 2211.12446).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Coupling:
    """One instruction: `target <- a * target + c * source + b * f(source, tag)`, where source is the other of the two
    values.

    target: 0 or 1, which of the pair is changed.
    a, c, b: finite floats, `a` not zero. With `b == 0` the function f is never evaluated.
    step: which step of the solver it belongs to (an engine may store its state at step boundaries).
    tag: handed to f unchanged, a timestep for instance.

    Raises ValueError for another target, a zero `a` (it could not be undone) or a coefficient that is not finite.
    """

    target: int
    a: float = 1.0
    c: float = 0.0
    b: float = 0.0
    step: int = 0
    tag: Any = None

    def __post_init__(self) -> None:
        if self.target not in (0, 1):
            raise ValueError(f"target: expected 0 or 1, got {self.target!r}")
        if not all(math.isfinite(value) for value in (self.a, self.c, self.b)):
            raise ValueError(f"coefficients must be finite, got a={self.a}, c={self.c}, b={self.b}")
        if self.a == 0:
            raise ValueError("a must not be zero: a coupling that forgets its target cannot be undone")

    @property
    def source(self) -> int:
        """Index of the value that is read and left as it is."""
        return 1 - self.target

    @property
    def calls_network(self) -> bool:
        """Whether f is evaluated at all."""
        return self.b != 0

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes: `a = 1`, `c = b = 0`."""
        return self.a == 1 and self.c == 0 and self.b == 0

    def inverse(self) -> Coupling:
        """The coupling that undoes this one. It evaluates f at the same point, as the source is unchanged."""
        return Coupling(self.target, 1 / self.a, -self.c / self.a, -self.b / self.a, self.step, self.tag)


Program = tuple[Coupling, ...]


def compact(couplings: Iterable[Coupling]) -> Program:
    """The program without its exact no-ops (the last DDIM step at t = 0 has a = 1, b = 0, for instance)."""
    return tuple(coupling for coupling in couplings if not coupling.is_identity)


def invert(program: Iterable[Coupling]) -> Program:
    """The program that undoes `program`: inverse couplings in reverse order."""
    return tuple(coupling.inverse() for coupling in reversed(tuple(program)))


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
