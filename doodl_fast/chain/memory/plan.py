"""Predicts how much memory a gradient through a chain takes, and finds the fastest way that fits into a budget.

A forward run can keep more or less for its gradient, which then has less or more to compute again. It can keep, from
the largest to the smallest: the network graphs of its last evaluations; the sources of the evaluations, from which the
graphs are computed again; or a few states, from which couplings are undone. A graph can be kept whole, without what
matrix products make, or as the inputs of the network's blocks alone (see `ways.Way`), each evaluation's in its own way.

All sizes are in bytes.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from ..ways import KEPT, WAYS, WHOLE, Way

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LARGEST_SIZE = 2**60
"""The largest size that is accepted: one that is not a slip, and that every part of PyTorch can count with."""
AUTO = "auto"
Graphs = tuple[tuple[Way, int], ...]
"""Ways to keep graphs, and of how many evaluations each."""
ANCHOR_STEPS = 10
"""The number of steps between stored states, where the sources would take too much. Undoing EDICT's mixing over so many
steps multiplies rounding errors by 4 (docs/precision.md)."""
MARGIN = 0.1
"""The share of the free memory that a default budget leaves, for fragmentation and for operators' scratch memory."""
WORKING = 4
"""How many tensors of a source's size a backward pass works on: two cotangents, and the two that replace them."""
STEP_DOWN = 0.9
"""After running out of memory, a plan is tried only if its peak is at most this share of the failed one's."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one evaluation of a network in one way.

    Attributes:
        value: The peak while it is evaluated without a graph.
        graph: What its graph holds.
        pull: The peak while it is evaluated with a graph and a cotangent is pulled back through that.
        again: How much of an evaluation is computed again while the cotangent is pulled back, as a share of one.
    """

    value: int
    graph: int
    pull: int
    again: float = 0.0


@dataclass(frozen=True)
class Workload:
    """A gradient through a chain, in numbers.

    Attributes:
        evaluations: How often a forward run evaluates the network.
        steps: How many steps the chain has.
        source: The size of what one evaluation reads.
        state: The size of a stored state.
        states: The ways of storing that there are (see `Plan`), the fastest first.
        sizes: Tells the sizes of an evaluation in a way; None where they cannot be had.
        graphs: Whether graphs can be kept.
    """

    evaluations: int
    steps: int
    source: int
    state: int
    states: tuple[str | int, ...]
    sizes: Callable[[Way], Sizes | None]
    graphs: bool = True

    def plan(self, graphs: Graphs = (), states: str | int = "checkpoint", way: Way = WHOLE, reserve: int = 0) -> Plan:
        """The plan that keeps what is said.

        Args:
            graphs: As in `Plan`, like states and way. The sizes of all these ways can be had.
            reserve: What else is taken between the forward and the backward pass.
        """
        graphs = tuple((kept, count) for kept, count in graphs if count)
        sizes = self._known(way)
        stored = self.source * self.evaluations
        if states != "checkpoint":
            # The states at the end and at the start, and those between them.
            anchors = 0 if states == "reversible" else (self.steps - 1) // int(states)
            stored = self.state * (2 + anchors)
        rest = self.evaluations - sum(count for _, count in graphs)
        held, recomputed, pulls = 0, rest * (1 + sizes.again), [sizes.pull if rest else 0]
        for kept, count in graphs:
            own = self._known(kept)
            held += count * own.graph
            recomputed += count * own.again
            pulls.append(held - own.graph + own.pull)  # The graphs of later evaluations are freed by then.
        changing = 2 * self.state  # A state and the one that replaces it.
        forward = changing + max(sizes.value, held)
        between = WORKING * self.source + held + reserve
        backward = WORKING * self.source + max(pulls) + (0 if states == "checkpoint" else changing)
        peak = stored + max(forward, between, backward)
        return Plan(graphs, states, way, peak, recomputed, self.evaluations, self.steps)

    def replayed(self, reserve: int = 0) -> Plan | None:
        """The plan in which recordings of calls are replayed; None where an evaluation cannot be measured.

        A recording holds the memory of one call with its VJP, and the network's own call is compared with it while it
        is made. What a replay leaves for a VJP is gone with the next replay, so no graphs are kept.
        """
        sizes = self.sizes(WHOLE)
        if sizes is None:
            return None
        work = max(2 * self.state + sizes.value, WORKING * self.source + max(reserve, sizes.pull))
        peak = self.source * self.evaluations + sizes.pull + work
        n = self.evaluations
        return Plan((), "checkpoint", WHOLE, peak, n, n, self.steps, sizes.pull)

    def plans(self, reserve: int = 0) -> Iterator[Plan]:
        """The plans that keep no graphs, the fastest first."""
        for way in WAYS:
            if self.sizes(way) is not None:
                yield from (self.plan((), states, way, reserve) for states in self.states)

    def fastest(self, budget: int, reserve: int = 0) -> Plan | None:
        """The plan within a budget that computes the least again; None where there is none."""
        for plan in self.plans(reserve):
            if plan.peak <= budget:
                return self._with_graphs(plan, budget, reserve)
        return None

    def smaller(self, plan: Plan, reserve: int = 0) -> Plan | None:
        """The next smaller plan: without recordings, with half the bytes in graphs, then without any graphs; None after
        the smallest."""
        held = sum(count * self._known(kept).graph for kept, count in plan.graphs)
        if plan.recordings:
            return self.plan((), plan.states, plan.way, reserve)
        if held:
            bare = self.plan((), plan.states, plan.way, reserve)
            half = self._with_graphs(bare, plan.peak - (held + 1) // 2, reserve)
            if half.graphs and half.peak < plan.peak:
                return half
        without = list(self.plans(reserve))
        ways = [(other.states, other.way) for other in without]
        later = [other for other in without[ways.index((plan.states, plan.way)) + 1 :] if other.peak < plan.peak]
        worthwhile = (other for other in later if other.peak <= STEP_DOWN * plan.peak)
        return next(worthwhile, None) or (later[-1] if later else None)

    def smallest(self, reserve: int = 0) -> Plan | None:
        """The plan of the lowest peak; None where nothing can be measured."""
        return min(self.plans(reserve), key=lambda plan: plan.peak, default=None)

    def _known(self, way: Way) -> Sizes:
        """The sizes of a way that are known to be there."""
        sizes = self.sizes(way)
        assert sizes is not None
        return sizes

    def _with_graphs(self, bare: Plan, budget: int, reserve: int) -> Plan:
        """A plan without graphs, with those graphs that leave the least to compute again within a budget.

        Each evaluation keeps its graph in one of a few ways, or keeps none. All evaluations have the same sizes. So a
        mixture of two ways uses the budget up to a rest that is smaller than one graph, and a third way is tried there.
        """
        if not self.graphs or bare.peak > budget:
            return bare

        def mix(*graphs: tuple[Way | None, int]) -> Plan:
            kept = tuple((way, count) for way, count in graphs if way is not None)
            return self.plan(kept, bare.states, bare.way, reserve)

        def most(limit: int, plan_of: Callable[[int], Plan]) -> int:
            """The largest count up to a limit whose plan fits; 0 if none does."""
            fits, too_many = 0, limit + 1
            while too_many - fits > 1:
                count = (fits + too_many) // 2
                fits, too_many = (count, too_many) if plan_of(count).peak <= budget else (fits, count)
            return fits

        n = self.evaluations
        if self.sizes(WHOLE) is not None and (everything := mix((WHOLE, n))).peak <= budget:
            return everything
        sizes = {way: known for way in KEPT if (known := self.sizes(way)) is not None}
        # From the smallest graph to the largest, which is the order in which the evaluations have them.
        ladder: list[Way | None] = [None, *sorted(sizes, key=lambda way: sizes[way].graph)]
        best = bare
        for low, high in itertools.combinations(ladder, 2):
            if mix((low, n)).peak > budget:
                continue
            many = most(n, lambda k, low=low, high=high: mix((low, n - k), (high, k)))  # type: ignore[misc]
            best = min(best, mix((low, n - many), (high, many)), key=lambda plan: plan.recomputed)
            for middle in ladder[ladder.index(low) + 1 : ladder.index(high)]:
                left = n - many
                some = most(
                    left,
                    lambda k, low=low, middle=middle, high=high, left=left, many=many: mix(  # type: ignore[misc]
                        (low, left - k), (middle, k), (high, many)
                    ),
                )
                third = mix((low, left - some), (middle, some), (high, many))
                best = min(best, third, key=lambda plan: plan.recomputed)
        return best


@dataclass(frozen=True)
class Plan:
    """What a forward run keeps for its gradient, and what that costs. It prints itself as a short table.

    Attributes:
        graphs: The ways in which graphs of the last evaluations are kept, in the order of the evaluations, and of how
            many evaluations each.
        states: What is stored for the others: "checkpoint" for their sources, "reversible" for the final state, or an
            int k for a state every k steps.
        way: How the others have their graphs when they are evaluated again.
        peak: The predicted peak in bytes, beyond what was there before the run.
        recomputed: How many evaluations of the network, not counting their VJPs, the backward pass does again. Parts of
            evaluations count as the share of floating-point operations that they are.
        evaluations: How many evaluations a forward run of the chain has.
        steps: How many steps it has.
        recordings: The bytes in recordings of the network's calls, which are replayed; 0 if it is called.
    """

    graphs: Graphs
    states: str | int
    way: Way
    peak: int
    recomputed: float
    evaluations: int
    steps: int
    recordings: int = 0

    @property
    def num_graphs(self) -> int:
        """Of how many of the last evaluations graphs are kept, in whatever way."""
        return sum(count for _, count in self.graphs)

    def seconds(self, call: float, call_and_vjp: float) -> float:
        """What the network takes in a gradient, given the seconds of a call, and of a call with a graph and its VJP."""
        return self.evaluations * call_and_vjp + self.recomputed * call

    @property
    def kept(self) -> str:
        """What is kept, in words."""
        rest, parts = self.evaluations, list[str]()
        for way, count in reversed(self.graphs):
            if count == self.evaluations:
                which = "all evaluations"
            elif not parts:
                which = "the last evaluation" if count == 1 else f"the last {count} evaluations"
            else:
                which = f"the {count} before"
            rest -= count
            parts.append(f"{way.graphs} of {which}")
        if rest and self.states == "checkpoint":
            parts.append(f"sources of {'all' if not self.graphs else f'the first {rest}'} evaluations")
        elif rest:
            parts.append("the final state" if self.states == "reversible" else f"a state every {self.states} steps")
        return ", ".join(parts[:-1]) + (" and " if parts[1:] else "") + "".join(parts[-1:])

    @property
    def again(self) -> str:
        """What is computed again, in words."""
        return f"{self.recomputed:.3g} evaluation{'' if self.recomputed == 1 else 's'}"

    def __str__(self) -> str:
        share = self.recomputed / max(1, self.evaluations)
        rows = [
            ("kept", self.kept),
            ("inside the network", self.way.inside),
            ("predicted peak", format_bytes(self.peak)),
            ("predicted recomputation", f"{self.again} ({share:.0%} of a forward run)"),
        ]
        if self.recordings:
            calls = f"replayed as CUDA graphs, whose recordings hold {format_bytes(self.recordings)}"
            rows.insert(2, ("the network's calls", calls))
        return "\n".join(f"{name:<24} {value}" for name, value in rows)


def parse_bytes(value: Any, name: str = "memory_budget") -> int:
    """Reads a number of bytes.

    Args:
        value: An int, or a string such as "6GiB", "500 MB" or "1.5GB". KB, MB, GB and TB are powers of 1000, KiB, MiB,
            GiB and TiB powers of 1024; a number alone counts bytes. Digits are ASCII digits.
        name: The argument that errors name.

    Raises:
        TypeError: It is neither an int nor a string.
        ValueError: The string is no size, or the size is below 1 byte or above 1 EiB (2**60 bytes).
    """
    if isinstance(value, int) and not isinstance(value, bool):
        count, got = value, str(value) if abs(value) <= 10**20 else f"an int of {value.bit_length()} bits"
    elif isinstance(value, str):
        got = repr(value if len(value) <= 40 else f"{value[:40]}...")
        # The flag keeps other scripts' digits out, and the Kelvin sign, which would match K.
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)\s*", value, re.IGNORECASE | re.ASCII)
        if found is None or found[2].upper() not in UNITS:
            raise ValueError(f'{name}: expected bytes or a size such as "6GiB" or "500MB", got {got}')
        count = int(Decimal(found[1]) * UNITS[found[2].upper()])
    else:
        raise TypeError(f'{name}: expected bytes or a size such as "6GiB", got {type(value).__name__}')
    if count < 1:
        raise ValueError(f"{name}: expected at least 1 byte, got {got}")
    if count > LARGEST_SIZE:
        raise ValueError(f"{name}: expected at most 1 EiB (2**60 bytes), which no machine has, got {got}")
    return count


def format_bytes(count: float) -> str:
    """A size as text, in binary units and to three digits."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if abs(count) < 1000 else f"{count:.0f} GiB"


def free_bytes(device: torch.device) -> int:
    """The default budget: the free memory less a margin. What PyTorch's CUDA cache holds unused counts as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = min(_available(), _left_of_group())
    return int(free * (1 - MARGIN))


def _available() -> int:
    """The bytes of main memory that are available."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    # Not every system tells what is free.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _left_of_group() -> int:
    """The bytes that are left of a container's limit (cgroup v2), if there is one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        return 2**63 if limit == "max" else int(limit) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**63
