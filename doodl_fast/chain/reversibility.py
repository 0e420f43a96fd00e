"""How exactly a chain can be undone, step by step, in both directions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import arithmetic
from .arithmetic import Arithmetic, Eps, Group
from .chain import Chain
from .checks import distance
from .latents import check_latents
from .program import step_boundaries
from .run import ProgramRun
from .walk import walk_backwards, walk_forwards


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


def there_and_back(run: ProgramRun, work: Arithmetic, x: Tensor, y: Tensor, graph: bool = True) -> tuple[float, ...]:
    """Runs a program and undoes it from its end.

    Args:
        run: The run. Its groups end wherever a step ends.
        work: The arithmetic that the state is held in.
        x: Latents (B, C, ...) at the start.
        y: The other latents.
        graph: Whether undoing evaluates the network with a graph.

    Returns:
        The error after each number of steps, from 0 on. Where an undone state is not finite, that error and those of
        fewer steps are NaN, and the steps before it are not undone.
    """
    boundaries = step_boundaries(run.program, 1) | {0}
    tensors = run.evaluator.tensors()

    def evaluate(group: Group, source: Tensor | None) -> Eps:
        assert group.coupling is not None and source is not None
        return run.evaluate(source, group.coupling, tensors)

    def evaluate_again(group: Group, source: Tensor | None) -> Eps | None:
        if source is None:
            return None
        with torch.set_grad_enabled(graph):
            return evaluate(group, source.detach().requires_grad_(graph)).detach()

    state = work.enter(x, y)
    kept = {0: list(state)}
    for group, _ in walk_forwards(run.groups, work, state, evaluate):
        if group.end in boundaries:
            kept[group.end] = list(state)
    errors = [0.0]
    for position in walk_backwards(run.groups, work, state, evaluate_again):
        if position in boundaries:
            errors.append(float(distance(state, kept[position])))
            if not math.isfinite(errors[-1]):
                return (math.nan,) * (len(kept) - len(errors) + 1) + tuple(reversed(errors[:-1]))
    work.finish()
    return tuple(reversed(errors))
