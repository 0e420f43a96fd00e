"""Chains with memory="auto" for the tests of plans."""

from __future__ import annotations

import torch
from conftest import golden_denoiser, sd_scheduler

from doodl_fast.chain.memory.plan import Plan
from doodl_fast.chain.ways import WHOLE, Way
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT


def fix(chain: EDICT, graphs, states: str | int = "checkpoint", way: Way = WHOLE) -> EDICT:
    """Gives a chain a plan that the test chose. graphs: the number of whole ones, or what a plan has."""
    graphs = ((WHOLE, graphs),) if isinstance(graphs, int) else graphs
    plan = Plan(graphs, states, way, 0, 0, chain.num_network_calls, len(chain.schedule))
    chain.planner.choose = lambda *case: plan
    return chain


def auto(budget: int | str | None = None, steps: int = 3, **options) -> EDICT:
    schedule = Schedule.from_scheduler(sd_scheduler(), steps)
    return EDICT(golden_denoiser(torch.float32), schedule, memory="auto", memory_budget=budget, **options)
