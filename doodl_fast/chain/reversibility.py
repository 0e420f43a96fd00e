"""How exactly a chain can be undone, step by step, in both directions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import arithmetic
from .arithmetic import Arithmetic, Group
from .chain import Chain
from .checks import distance
from .latents import check_latents
from .program import step_boundaries
from .run import Run


@dataclass(frozen=True)
class Reversibility:
    """What `check_reversibility` found: |state undone - state| / |state| of (x, y) together, 0 being equal to the bit.

    forward: after the forward run, undone. forward[k] is the error of the state after k steps, so forward[0] that of
        the whole way there and back and forward[-1] = 0. NaN from where on an undone state was not finite.
    inverse: after the inverse run, done again; inverse[k] likewise, k counting steps of the inverse run.
    """

    forward: tuple[float, ...]
    inverse: tuple[float, ...]

    @property
    def exact(self) -> bool:
        """Whether both directions come back to the bit."""
        return not any(self.forward) and not any(self.inverse)

    def __str__(self) -> str:
        rows = [
            f"{k:>6}  {f:>10.2e}  {i:>10.2e}" for k, (f, i) in enumerate(zip(self.forward, self.inverse, strict=True))
        ]
        return "\n".join([f"{'steps':>6}  {'forward':>10}  {'inverse':>10}", *rows])


@torch.no_grad()
def check_reversibility(chain: Chain, x: Tensor, y: Tensor | None = None) -> Reversibility:
    """Runs a chain from latents (x, y) and undoes it, and undoes it from there and runs it again.

    x, y: (B, C, ...) as for `chain`; y=None is y = x. The same latents serve as noise and as image. Undoing evaluates
    the network with a graph, as a backward pass does, in case that picks other kernels. Costs four evaluations for each
    coupling with b != 0; keeps one state a step. Compared are states as the chain's arithmetic holds them.
    Raises what the chain raises.
    """
    check_latents(x, y)
    y = x if y is None else y
    directions = []
    for inverse in (False, True):
        run = chain.runs.new_run(x, inverse)
        run = replace(run, groups=arithmetic.group(run.program, step_boundaries(run.program, 1)))
        with chain.evaluator.running():
            directions.append(there_and_back(run, run.new_arithmetic(), x, y))
    return Reversibility(*directions)


def there_and_back(run: Run, work: Arithmetic, x: Tensor, y: Tensor, graph: bool = True) -> tuple[float, ...]:
    """A run's error after each number of steps, when it is undone from its end; graph: whether with one.

    Once an undone state is not finite, all that is left is NaN, and not run.
    """
    boundaries = step_boundaries(run.program, 1) | {0}
    tensors = run.evaluator.tensors()
    state = work.enter(x, y)
    kept = {0: list(state)}
    for group in run.groups:
        _do(run, work, group, state, tensors)
        if group.end in boundaries:
            kept[group.end] = list(state)
    errors = [0.0]
    for group, end in _undone(run.groups):
        _undo(run, work, group, state, tensors, graph)
        if end in boundaries:
            errors.append(float(distance(state, kept[end])))
            if not math.isfinite(errors[-1]):
                return (math.nan,) * (len(kept) - len(errors) + 1) + tuple(reversed(errors[:-1]))
    work.finish()
    return tuple(reversed(errors))


def _undone(groups: tuple[Group, ...]) -> Iterator[tuple[Group, int]]:
    """The groups from the last on, each with the number of couplings that are left when it is undone."""
    starts = [0, *(group.end for group in groups[:-1])]
    return zip(reversed(groups), reversed(starts), strict=True)


def _do(run: Run, work: Arithmetic, group: Group, state: list[Tensor], tensors: tuple[Tensor, ...]) -> None:
    eps = None
    if group.coupling is not None and group.calls_network:
        eps = run.evaluate(work.source(state, group.coupling), group.coupling, tensors)
    work.apply(group, state, eps)


def _undo(
    run: Run, work: Arithmetic, group: Group, state: list[Tensor], tensors: tuple[Tensor, ...], graph: bool
) -> None:
    work.undo_mixing(group, state)
    eps = None
    if group.coupling is not None and group.calls_network:
        source = work.source(state, group.coupling).detach()
        with torch.set_grad_enabled(graph):
            eps = run.evaluate(source.requires_grad_(graph), group.coupling, tensors).detach()
    work.undo_coupling(group, state, eps)
