"""The three ways through a program: forwards in passes, backwards in passes, and coupling by coupling in plain torch.

Each is a generator that changes a state in place and pauses after each pass, so that its caller can store the state,
compare it, or stop. What happens at the network is the caller's: a walk calls the function that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from .arithmetic import Arithmetic, Eps, Group
from .program import Coupling, Program


def walk_forwards(
    groups: Sequence[Group],
    work: Arithmetic,
    state: list[Tensor],
    evaluate: Callable[[Group, Tensor], Eps],
) -> Iterator[tuple[Group, Eps | None]]:
    """Does groups of couplings one after another.

    Args:
        groups: The program in passes.
        work: The arithmetic that the state is held in.
        state: Its entries are replaced.
        evaluate: Called with a group that needs the network and the source of its coupling.

    Yields:
        Each group once it is done, and what the network returned for it.
    """
    for group in groups:
        eps = None
        if group.coupling is not None and group.calls_network:
            eps = evaluate(group, work.source(state, group.coupling))
        work.apply(group, state, eps)
        yield group, eps


def walk_backwards(
    groups: Sequence[Group],
    work: Arithmetic,
    state: list[Tensor],
    visit: Callable[[Group, Tensor | None], Eps | None],
) -> Iterator[int]:
    """Goes through groups of couplings from the last to the first, and undoes them if there is a state.

    Args:
        groups: The program in passes.
        work: The arithmetic that the state is held in.
        state: The state after the last group; its entries are replaced. An empty list: nothing is undone.
        visit: Called with every group, once its mixing is undone, and with the source of its coupling (None if it needs
            no network, or if nothing is undone). Returns what the network returned, which undoes the coupling.

    Yields:
        How many couplings of the program come before the group that was just passed.
    """
    starts = [0, *(group.end for group in groups[:-1])]
    for group, start in zip(reversed(groups), reversed(starts), strict=False):
        source = None
        if state:
            work.undo_mixing(group, state)
            if group.coupling is not None and group.calls_network:
                source = work.source(state, group.coupling)
        eps = visit(group, source)
        if state:
            work.undo_coupling(group, state, eps)
        yield start


def walk_plainly(
    program: Program, values: list[Tensor], evaluate: Callable[[Coupling, Tensor], Tensor]
) -> Iterator[Coupling]:
    """Does couplings one after another in plain differentiable torch, without fused operators.

    Args:
        program: The couplings.
        values: The latents that the program works on, most often x and y; the entries are replaced.
        evaluate: Called with a coupling that needs the network and its source.

    Yields:
        Each coupling once it is done.
    """
    for coupling in program:
        source = values[coupling.source]
        value = evaluate(coupling, source) if coupling.calls_network else None
        values[coupling.target] = combined(coupling, values[coupling.target], source, value)
        yield coupling


def combined(coupling: Coupling, target: Tensor, source: Tensor, value: Tensor | None) -> Tensor:
    """`a target + c source + b value` in the state's dtype, in the order of `ops.coupling`.

    Each operation stands on its own, as torch.add with alpha would contract two roundings into one on some devices. So
    all memory modes give the same bits.
    """
    if coupling.a != 1:
        target = target * coupling.a
    if coupling.c:
        target = target + source * coupling.c
    if value is not None:
        target = target + value * coupling.b
    return target
