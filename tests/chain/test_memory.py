"""Budgets and plans: what is parsed, predicted, chosen and printed. No network runs here."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_chain

from doodl_fast import Auto
from doodl_fast.chain.memory import plan as memory
from doodl_fast.chain.memory.plan import Sizes, Workload, format_bytes, parse_bytes

PLAIN, BLOCKS = Sizes(value=30, graph=100, pull=130), Sizes(value=30, graph=20, pull=50)


def workload(blocks: Sizes | None = BLOCKS, states=("checkpoint", 10), **changes) -> Workload:
    options = {"evaluations": 40, "steps": 20, "source": 1, "state": 2, **changes}
    return Workload(**options, states=states, sizes=lambda checkpointed: blocks if checkpointed else PLAIN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (12, 12),
        ("12", 12),
        ("6GiB", 6 * 2**30),
        ("6 gib", 6 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5KiB", 1536),
        ("2TB", 2 * 10**12),
        ("0.1GB", 10**8),  # The rounding of 0.1 to a float costs no byte.
        ("1048576TiB", 2**60),
        (2**60, 2**60),
    ],
)
def test_budgets(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("bad", ["", "six", "6 GX", "-1GiB", "GiB", 0, -5, "0"])
def test_budgets_that_are_none(bad):
    with pytest.raises(ValueError, match=r"memory_budget: expected .* got "):
        parse_bytes(bad)


@pytest.mark.parametrize(
    "bad", [" ", "٦GiB", "６GiB", "6.५GB", "6 \u212aB", "6\u00a0GiB", "1e9", "+6GiB", "6GiB\n6", "1_000"]
)
def test_budgets_are_ascii_digits_and_units(bad):
    with pytest.raises(ValueError, match=r'memory_budget: expected bytes or a size such as "6GiB" or "500MB", got '):
        parse_bytes(bad)


@pytest.mark.parametrize(
    "bad",
    ["99999999999999999999", 99999999999999999999, "9" * 400, "9" * 9999, 10**4000, "1" + "0" * 400 + "TB", 2**60 + 1],
)
def test_absurd_budgets(bad):
    with pytest.raises(ValueError, match=r"memory_budget: expected at most 1 EiB \(2\*\*60 bytes\)") as said:
        parse_bytes(bad)
    assert len(str(said.value)) < 200
    with pytest.raises(ValueError, match=r"^budget: expected at most 1 EiB"):
        Auto(bad)
    with pytest.raises(ValueError, match=r"^memory_budget: expected at most 1 EiB"):
        tiny_chain(2, "auto", memory_budget=bad)


@pytest.mark.parametrize("bad", [1.5, None, True, b"6GiB"])
def test_budgets_of_another_type(bad):
    with pytest.raises(TypeError, match=r"memory_budget: expected bytes or a size .* got "):
        parse_bytes(bad)


def test_sizes_are_printed_in_three_digits():
    assert [format_bytes(n) for n in (0, 999, 1000, 2048, 3 << 20, 1536 << 20, 1 << 43)] == [
        "0 B",
        "999 B",
        "0.977 KiB",
        "2 KiB",
        "3 MiB",
        "1.5 GiB",
        "8192 GiB",
    ]


def test_the_free_memory_of_this_machine():
    free = memory.free_bytes(torch.device("cpu"))
    assert 2**20 < free < 2**50


def test_plans_from_the_largest_budget_to_the_smallest():
    """Each plan is within its budget and faster than the next: with all graphs, some, none, then with blocks."""
    load = workload()
    everything = load.fastest(10**6)
    assert (everything.graphs, everything.states, everything.blocks, everything.recomputed) == (40, "checkpoint", 0, 0)
    seen, budget = [], everything.peak
    while (plan := load.fastest(budget)) is not None:
        assert plan.peak <= budget
        seen.append(plan)
        budget = plan.peak - 1
    ways = [(plan.blocks, str(plan.states) != "checkpoint", plan.recomputed) for plan in seen]
    assert ways == sorted(ways)
    assert seen[-1].peak == load.smallest().peak and seen[-1].blocks
    assert {(plan.states, plan.blocks) for plan in seen} == {(s, b) for s in ("checkpoint", 10) for b in (False, True)}


def test_what_a_plan_takes():
    """Here 40 sources take 1 byte each, and a state takes 2. A kept graph is pulled back without a copy."""
    load = workload()
    peaks = [load.plan(graphs, "checkpoint", False).peak for graphs in (0, 1, 2, 40)]
    assert peaks == [44 + n for n in (130, 130, 230, 39 * 100 + 130)]
    assert load.plan(0, "checkpoint", True).peak == 44 + 50
    assert load.plan(0, 10, False).peak == (2 + 1) * 2 + 8 + 130  # The states are the start, the end and one between.
    assert load.plan(0, "reversible", False).peak == 2 * 2 + 8 + 130
    assert load.plan(2, "checkpoint", False, reserve=500).peak == 44 + 2 * 100 + 500
    big = workload(state=1000).plan(0, "checkpoint", False)
    assert big.peak == 40 + 2 * 1000 + 30  # This is the peak of the forward run.
    recomputed = [load.plan(g, "checkpoint", blocks).recomputed for g, blocks in ((0, 0), (5, 0), (5, 1), (0, 1))]
    assert recomputed == [40, 35, 75, 80]


def test_a_reserve_costs_graphs():
    load = workload()
    assert load.fastest(1000).graphs == 9
    assert load.fastest(1000, reserve=500).graphs == 4


def test_the_next_smaller_plan():
    """It has half the graphs. Then come plans that are a tenth smaller, and at last the smallest of all."""
    load, plan, seen = workload(), workload().plan(40, "checkpoint", False), []
    while plan is not None:
        seen.append((plan.graphs, plan.states, plan.blocks))
        plan = load.smaller(plan)
    plain = [(graphs, "checkpoint", False) for graphs in (40, 20, 10, 5, 2, 1)]
    assert seen == [*plain, (0, 10, False), (0, "checkpoint", True), (0, 10, True)]
    load = workload(blocks=None, source=0)
    assert load.smaller(load.plan(1, "checkpoint", False)) is None


def test_networks_without_blocks_or_graphs():
    load = workload(blocks=None)
    assert load.smallest().peak == load.plan(0, 10, False).peak and not load.smallest().blocks
    assert load.fastest(load.smallest().peak - 1) is None
    assert workload(graphs=False).fastest(10**6).graphs == 0


def test_a_plan_prints_itself():
    text = str(workload().plan(5, "checkpoint", True))
    assert [line.split(" ", 1)[0] for line in text.splitlines()] == ["kept", "inside", "predicted", "predicted"]
    assert "graphs of the last 5 evaluations and sources of the first 35 evaluations" in text
    assert "inputs of its blocks" in text and "75 evaluations (188% of a forward run)" in text
    assert "graphs of all evaluations" in str(workload().plan(40, "checkpoint", False))
    assert "sources of all evaluations" in str(workload().plan(0, "checkpoint", False))
    assert "a state every 10 steps" in str(workload().plan(0, 10, False))
    assert "the final state" in str(workload().plan(0, "reversible", False))
