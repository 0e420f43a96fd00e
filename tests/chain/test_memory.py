"""Budgets and plans: what is parsed, predicted, chosen and printed. No network runs here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import tiny_chain

from doodl_fast import Auto
from doodl_fast.chain.memory import plan as memory
from doodl_fast.chain.memory.plan import Sizes, Workload, format_bytes, parse_bytes
from doodl_fast.chain.ways import BLOCKS, KEPT, RECOMPUTE, SMALLEST, WAYS, WHOLE

SIZES = {
    WHOLE: Sizes(value=30, graph=100, pull=130),
    RECOMPUTE: Sizes(value=30, graph=50, pull=90, again=0.25),
    BLOCKS: Sizes(value=30, graph=20, pull=50, again=0.5),
    SMALLEST: Sizes(value=30, graph=20, pull=45, again=0.75),
}
CHECKPOINTED = {way: Sizes(30, 20, 50, 1.0) if way == BLOCKS else SIZES[way] for way in (WHOLE, BLOCKS)}


def workload(sizes=SIZES, states=("checkpoint", 10), **changes) -> Workload:
    options = {"evaluations": 40, "steps": 20, "source": 1, "state": 2, **changes}
    return Workload(**options, states=states, sizes=sizes.get)


def graphs(whole=0, recompute=0, blocks=0):
    """So many graphs of each way, in the order in which evaluations have them."""
    return (BLOCKS, blocks), (RECOMPUTE, recompute), (WHOLE, whole)


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
    """Each plan is within its budget and faster than the next: with all graphs, smaller ones, some, none."""
    load = workload()
    everything = load.fastest(10**6)
    assert (everything.graphs, everything.states, everything.way) == (((WHOLE, 40),), "checkpoint", WHOLE)
    assert everything.recomputed == 0 and everything.num_graphs == 40
    seen, budget = [], everything.peak
    while (plan := load.fastest(budget)) is not None:
        assert plan.peak <= budget
        seen.append(plan)
        budget = plan.peak - 1
    ways = [(WAYS.index(plan.way), str(plan.states) != "checkpoint") for plan in seen]
    assert ways == sorted(ways)
    for _, group in itertools.groupby(seen, key=lambda plan: (plan.way, plan.states)):
        again = [plan.recomputed for plan in group]
        assert again == sorted(again)
    assert seen[-1].peak == load.smallest().peak and seen[-1].way == SMALLEST
    assert {(plan.states, plan.way) for plan in seen} >= {("checkpoint", WHOLE), *((10, way) for way in WAYS)}


def by_trying_everything(load: Workload, budget: int) -> float:
    """The least that a plan within a budget computes again, of all that keep sources."""
    least, n = math.inf, load.evaluations
    for whole, recompute, blocks in itertools.product(range(n + 1), repeat=3):
        if whole + recompute + blocks <= n:
            plan = load.plan(graphs(whole, recompute, blocks))
            least = min(least, plan.recomputed if plan.peak <= budget else math.inf)
    return least


def test_the_knapsack_of_graphs():
    """Against trying every mixture: at most half an evaluation more is computed again, and most often none."""
    load, excess = workload(evaluations=9, steps=5), []
    for budget in range(160, 1000, 7):
        plan = load.fastest(budget)
        assert plan.peak <= budget
        excess.append(plan.recomputed - by_trying_everything(load, budget))
    assert min(excess) == 0 and max(excess) <= 0.5 and sum(excess) / len(excess) < 0.1
    assert any(len(load.fastest(budget).graphs) == 3 for budget in range(160, 1000, 7))


def test_what_a_plan_takes():
    """Here 40 sources take 1 byte each, and a state takes 2. A kept graph is pulled back without a copy."""
    load = workload(CHECKPOINTED)
    peaks = [load.plan(graphs(count)).peak for count in (0, 1, 2, 40)]
    assert peaks == [44 + n for n in (130, 130, 230, 39 * 100 + 130)]
    assert load.plan(way=BLOCKS).peak == 44 + 50
    assert load.plan((), 10).peak == (2 + 1) * 2 + 8 + 130  # The states are the start, the end and one between.
    assert load.plan((), "reversible").peak == 2 * 2 + 8 + 130
    assert load.plan(graphs(2), reserve=500).peak == 44 + 2 * 100 + 500
    big = workload(state=1000).plan()
    assert big.peak == 40 + 2 * 1000 + 30  # This is the peak of the forward run.
    cases = ((graphs(), WHOLE), (graphs(5), WHOLE), (graphs(blocks=5), BLOCKS), (graphs(), BLOCKS))
    assert [load.plan(kept, way=way).recomputed for kept, way in cases] == [40, 35, 75, 80]


def test_what_a_mixture_takes():
    """Graphs are freed from the last evaluation to the first, so those that need the most room at once come first."""
    load = workload()
    assert load.plan(graphs(2, 3, 4)).peak == 44 + 4 * 20 + 3 * 50 + 2 * 100 + 30  # when the last graph is pulled back
    assert load.plan(graphs(0, 0, 3)).peak == 44 + 130  # when a source is evaluated again
    assert load.plan(graphs(0, 0, 40)).peak == 44 + 40 * 20 + 30
    assert load.plan(graphs(1, 0, 30), way=BLOCKS).peak == 44 + 30 * 20 + 100 + 30
    assert load.plan(graphs(2, 3, 4)).recomputed == 3 * 0.25 + 4 * 0.5 + 31
    assert load.plan(graphs(2, 3, 4), way=BLOCKS).recomputed == 3 * 0.25 + 4 * 0.5 + 31 * 1.5


def test_a_reserve_costs_graphs():
    load = workload(CHECKPOINTED)
    kept = [load.fastest(1000, reserve=reserve) for reserve in (0, 500)]
    assert kept[0].recomputed < kept[1].recomputed and max(plan.peak for plan in kept) <= 1000


def test_the_next_smaller_plan():
    """It has half the bytes in graphs. Then come plans that are a tenth smaller, and at last the smallest of all."""
    load = workload({WHOLE: SIZES[WHOLE]})
    plan, seen = load.plan(graphs(40)), []
    while plan is not None:
        seen.append((plan.num_graphs, plan.states, plan.way))
        plan = load.smaller(plan)
    assert seen == [*((count, "checkpoint", WHOLE) for count in (40, 20, 10, 5, 2, 1)), (0, 10, WHOLE)]
    load, plan, seen = workload(), workload().plan(graphs(40)), []
    while plan is not None:
        seen.append(plan)
        plan = load.smaller(plan)
    held = [sum(count * SIZES[way].graph for way, count in plan.graphs) for plan in seen]
    kept = held.index(0)
    assert all(after <= before / 2 + 50 for before, after in itertools.pairwise(held[:kept]))
    assert all(after.peak < before.peak for before, after in itertools.pairwise(seen))
    assert [(plan.states, plan.way) for plan in seen[kept:]] == [(10, way) for way in WAYS]
    load = workload({WHOLE: SIZES[WHOLE]}, source=0)
    assert load.smaller(load.plan(graphs(1))) is None


def test_networks_without_blocks_or_graphs():
    load = workload({WHOLE: SIZES[WHOLE]})
    assert load.smallest().peak == load.plan((), 10).peak and load.smallest().way == WHOLE
    assert load.fastest(load.smallest().peak - 1) is None
    assert workload(graphs=False).fastest(10**6).num_graphs == 0


def test_a_plan_prints_itself():
    load = workload(CHECKPOINTED)
    text = str(load.plan(graphs(blocks=5), way=BLOCKS))
    assert [line.split(" ", 1)[0] for line in text.splitlines()] == ["kept", "inside", "predicted", "predicted"]
    assert "inputs of blocks of the last 5 evaluations and sources of the first 35 evaluations" in text
    assert "network       inputs of its blocks" in text and "75 evaluations (188% of a forward run)" in text
    assert "graphs of all evaluations" in str(load.plan(graphs(40)))
    assert "sources of all evaluations" in str(load.plan())
    assert "a state every 10 steps" in str(load.plan((), 10))
    assert "the final state" in str(load.plan((), "reversible"))
    text = str(workload().plan(graphs(1, 2, 3)))
    assert (
        "kept                     graphs of the last evaluation, graphs without matrix products of the 2 before, "
        in text
    )
    assert ", inputs of blocks of the 3 before and sources of the first 34 evaluations\n" in text
    assert "predicted recomputation  36 evaluations (90% of a forward run)" in text
    assert "1 evaluation (" in str(load.plan(graphs(39)))
    assert all(way.graphs and way.inside for way in KEPT)
