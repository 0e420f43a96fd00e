"""Predicts how much memory a gradient through a chain takes, and finds the fastest way that fits into a budget.

A forward run can keep more or less for its gradient, which then has less or more to compute again. It can keep, from
the largest to the smallest: the whole network graphs of its last evaluations; the sources of the evaluations, from
which the graphs are computed again; or a few states, from which couplings are undone. In addition the network can keep
the inputs of its blocks instead of everything inside them (gradient checkpointing, Chen et al., arXiv 1604.06174).

All sizes are in bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LARGEST_SIZE = 2**60
"""The largest size that is accepted: one that is not a slip, and that every part of PyTorch can count with."""
AUTO = "auto"
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
    """The sizes of one evaluation of a network.

    Attributes:
        value: The peak while it is evaluated without a graph.
        graph: What its graph holds.
        pull: The peak while it is evaluated with a graph and a cotangent is pulled back through that.
    """

    value: int
    graph: int
    pull: int


@dataclass(frozen=True)
class Workload:
    """A gradient through a chain, in numbers.

    Attributes:
        evaluations: How often a forward run evaluates the network.
        steps: How many steps the chain has.
        source: The size of what one evaluation reads.
        state: The size of a stored state.
        states: The ways of storing that there are (see `Plan`), the fastest first.
        sizes: Tells the sizes of an evaluation, given whether the network's blocks are checkpointed; None where they
            cannot be had.
        graphs: Whether whole graphs can be kept.
    """

    evaluations: int
    steps: int
    source: int
    state: int
    states: tuple[str | int, ...]
    sizes: Callable[[bool], Sizes | None]
    graphs: bool = True

    def plan(self, graphs: int, states: str | int, blocks: bool, reserve: int = 0) -> Plan | None:
        """The plan that keeps what is said; None where the sizes cannot be had.

        Args:
            graphs: As in `Plan`, like states and blocks.
            reserve: What else is taken between the forward and the backward pass.
        """
        sizes = self.sizes(blocks)
        if sizes is None:
            return None
        stored = self.source * self.evaluations
        if states != "checkpoint":
            # The states at the end and at the start, and those between them.
            anchors = 0 if states == "reversible" else (self.steps - 1) // int(states)
            stored = self.state * (2 + anchors)
        kept, changing = graphs * sizes.graph, 2 * self.state  # A state and the one that replaces it.
        forward = changing + max(sizes.value, kept)
        between = WORKING * self.source + kept + reserve
        backward = WORKING * self.source + max(0, kept - sizes.graph) + sizes.pull
        backward += 0 if states == "checkpoint" else changing
        recomputed = self.evaluations - graphs + blocks * self.evaluations
        peak = stored + max(forward, between, backward)
        return Plan(graphs, states, blocks, peak, recomputed, self.evaluations, self.steps)

    def plans(self, reserve: int = 0) -> Iterator[Plan]:
        """The plans that keep no graphs, the fastest first."""
        for blocks in (False, True):
            for states in self.states:
                plan = self.plan(0, states, blocks, reserve)
                if plan is not None:
                    yield plan

    def fastest(self, budget: int, reserve: int = 0) -> Plan | None:
        """The plan within a budget that computes the least again; None where there is none."""
        for plan in self.plans(reserve):
            if plan.peak <= budget:
                best = plan
                for graphs in range(self.evaluations, 0, -1) if self.graphs else ():
                    more = self.plan(graphs, plan.states, plan.blocks, reserve)
                    if more is not None and more.peak <= budget:
                        best = more
                        break
                return best
        return None

    def smaller(self, plan: Plan, reserve: int = 0) -> Plan | None:
        """The next smaller plan: half the graphs, and then the plans without any; None after the smallest."""
        if plan.graphs > 1:
            return self.plan(plan.graphs // 2, plan.states, plan.blocks, reserve)
        without = list(self.plans(reserve))
        ways = [(other.states, other.blocks) for other in without]
        later = [other for other in without[ways.index((plan.states, plan.blocks)) + 1 :] if other.peak < plan.peak]
        worthwhile = (other for other in later if other.peak <= STEP_DOWN * plan.peak)
        return next(worthwhile, None) or (later[-1] if later else None)

    def smallest(self, reserve: int = 0) -> Plan | None:
        """The plan of the lowest peak; None where nothing can be measured."""
        return min(self.plans(reserve), key=lambda plan: plan.peak, default=None)


@dataclass(frozen=True)
class Plan:
    """What a forward run keeps for its gradient, and what that costs. It prints itself as a short table.

    Attributes:
        graphs: How many of the last evaluations keep their whole graph.
        states: What is stored for the others: "checkpoint" for their sources, "reversible" for the final state, or an
            int k for a state every k steps.
        blocks: Whether the network keeps the inputs of its blocks instead of everything inside them.
        peak: The predicted peak in bytes, beyond what was there before the run.
        recomputed: How many evaluations of the network, not counting their VJPs, the backward pass does again; those
            inside checkpointed blocks are included.
        evaluations: How many evaluations a forward run of the chain has.
        steps: How many steps it has.
    """

    graphs: int
    states: str | int
    blocks: bool
    peak: int
    recomputed: int
    evaluations: int
    steps: int

    @property
    def kept(self) -> str:
        """What is kept, in words."""
        rest = self.evaluations - self.graphs
        last = "the last evaluation" if self.graphs == 1 else f"the last {self.graphs} evaluations"
        parts = [f"graphs of {last if rest else 'all evaluations'}"] if self.graphs else []
        if rest and self.states == "checkpoint":
            parts.append(f"sources of {'all' if not self.graphs else f'the first {rest}'} evaluations")
        elif rest:
            parts.append("the final state" if self.states == "reversible" else f"a state every {self.states} steps")
        return " and ".join(parts)

    def __str__(self) -> str:
        share = self.recomputed / max(1, self.evaluations)
        rows = [
            ("kept", self.kept),
            ("inside the network", "inputs of its blocks" if self.blocks else "everything"),
            ("predicted peak", format_bytes(self.peak)),
            ("predicted recomputation", f"{self.recomputed} evaluations ({share:.0%} of a forward run)"),
        ]
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
