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
    """What `check_reversibility` found: errors |undone - state| / |state| of x and y together, 0 if equal to the bit.

    Attributes:
        forward: For a forward run that is undone from its end: forward[k] is the error of the state after k steps. So
            forward[0] is the error of the whole way there and back, and forward[-1] is 0. NaN where an undone state was
            not finite, and for all fewer steps.
        inverse: The same for an inverse run that is undone; k counts its steps.
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
    """Measures how far a chain comes back, in both directions, step by step.

    It runs the chain forwards and undoes that run, and runs it inversely and undoes that. Undoing evaluates the network
    with a graph, as a backward pass does, because that may pick other kernels. It takes four evaluations for each
    coupling with b != 0 and keeps one state a step. States are compared as the chain's arithmetic holds them.

    Args:
        chain: The chain.
        x: Latents (B, C, ...). They serve as noise for the forward run and as image for the inverse one.
        y: The other latents; None: y = x.

    Raises:
        ValueError, TypeError, FloatingPointError, OverflowError: As the chain itself.
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
