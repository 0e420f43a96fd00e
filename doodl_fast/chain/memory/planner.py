"""memory="auto": measures one evaluation of a chain's network, picks the plan, a smaller one when memory runs out."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..program import count_network_calls, step_boundaries
from ..run import NetworkPull, Run
from .plan import ANCHOR_STEPS, Plan, Sizes, Workload, format_bytes, free_bytes
from .tracker import OverLimit, Tracker, meter


@dataclass
class _Case:
    """What is known of runs over latents of one kind."""

    workload: Workload
    """Without the sizes of what is larger than the budget: nobody may take that much, for a measurement neither."""
    unlimited: Callable[[bool], Sizes | None]
    budget: int
    plan: Plan | None = None
    reserve: int = -1


class Planner:
    """The plans of one chain. budget: bytes; None: what is free when latents of a kind are first met.

    reserve: what is taken between a forward run and its backward pass, by a decoder and a guide. plan: the latest.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget, self.reserve = budget, 0
        self.plan: Plan | None = None
        self._cases: dict[Hashable, _Case] = {}
        self._said = False

    def choose(self, run: Run, x: Tensor, blocks: Callable[[], Run | None]) -> Plan:
        """The plan for a gradient of `run`. blocks: gives the run whose network checkpoints its blocks.

        Raises ValueError, naming the smallest possible budget.
        """
        case = self._case(run, x, blocks)
        if case.plan is None or case.reserve != self.reserve:
            case.plan, case.reserve = self._fitting(case, x), self.reserve
        self.plan = case.plan
        return case.plan

    def smallest(self, run: Run, x: Tensor, blocks: Callable[[], Run | None]) -> Plan:
        """The plan of the lowest peak. Raises OutOfMemoryError when not even one evaluation can be measured."""
        case = self._case(run, x, blocks)
        plan = replace(case.workload, sizes=case.unlimited).smallest(self.reserve)
        if plan is None:
            raise torch.OutOfMemoryError("memory: one evaluation of the network and its VJP ran out of it")
        return plan

    def shrink(self, run: Run, x: Tensor, blocks: Callable[[], Run | None]) -> Plan | None:
        """After running out of memory: the next smaller plan; None if there is none. Frees what can be; warns the first
        time."""
        case = self._case(run, x, blocks)
        before = case.plan or self._fitting(case, x)
        release(x.device)
        after = case.workload.smaller(before, self.reserve)
        if after is None:
            return None
        self.plan = case.plan = after
        if not self._said:
            self._said = True
            warnings.warn(
                f"memory: ran out of it with {before.kept} (predicted {format_bytes(before.peak)}); going on with "
                f"{after.kept}{', blocks checkpointed' if after.blocks else ''} (predicted "
                f"{format_bytes(after.peak)}). Said once per chain; chain.plan has the latest",
                RuntimeWarning,
                stacklevel=2,
            )
        return after

    def _fitting(self, case: _Case, x: Tensor) -> Plan:
        plan = case.workload.fastest(case.budget, self.reserve)
        if plan is not None:
            return plan
        smallest = replace(case.workload, sizes=case.unlimited).smallest(self.reserve)
        least = "even one evaluation ran out of memory" if smallest is None else f"at least {smallest.peak} bytes"
        size = "" if smallest is None else f" ({format_bytes(smallest.peak)}), the smallest possible"
        raise ValueError(
            f"memory_budget: expected {least}{size} for latents of shape {tuple(x.shape)}, got {case.budget} "
            f"({format_bytes(case.budget)}); give more, or use smaller or fewer latents or a network of half precision"
        )

    def _case(self, run: Run, x: Tensor, blocks: Callable[[], Run | None]) -> _Case:
        wanted = tuple(t.requires_grad for t in run.evaluator.tensors())
        key = (x.shape, x.dtype, x.device, wanted, str(run.autocast))
        if key not in self._cases:
            budget = free_bytes(x.device) if self.budget is None else self.budget

            @functools.cache
            def sizes(checkpointed: bool, limit: int | None = budget) -> Sizes | None:
                measured = blocks() if checkpointed else run
                return None if measured is None else probe(measured, x, limit)

            unlimited = functools.partial(sizes, limit=None)
            self._cases[key] = _Case(workload(run, x, sizes), unlimited, budget)
        return self._cases[key]


def workload(run: Run, x: Tensor, sizes: Callable[[bool], Sizes | None]) -> Workload:
    """That of a gradient of `run` over latents like x."""
    work = run.new_arithmetic()
    state = work.enter(x.detach(), x.detach())
    return Workload(
        evaluations=count_network_calls(run.program),
        steps=len(step_boundaries(run.program, 1)),
        source=x.numel() * run.state_dtype.itemsize,
        state=sum(z.numel() * z.element_size() for z in state),
        # undoing is free of drift in exact arithmetic alone
        states=("checkpoint", "reversible" if work.exact else ANCHOR_STEPS),
        sizes=sizes,
        graphs=run.for_vjp() is run,
    )


@torch.inference_mode(False)
@torch.no_grad()
def probe(run: Run, x: Tensor, limit: int | None = None) -> Sizes | None:
    """Measures one evaluation of a run's network and one VJP of it, at latents x; None if that ran out of memory, or
    would have taken more than `limit` bytes."""
    group = next((group for group in run.groups if group.calls_network), None)
    if group is None or group.coupling is None:
        return Sizes(0, 0, 0)
    try:
        with run.evaluator.running(), Tracker(x.device.type, limit=limit):
            tensors = run.evaluator.tensors()
            source = x.detach().to(run.state_dtype, copy=True)
            with meter(x.device) as value:
                run.evaluate(source, group.coupling, tensors)
            pull = NetworkPull(run, [t.clone() for t in tensors], [t.requires_grad for t in tensors])
            graph, held = None, 0
            with meter(x.device) as whole:
                if run.for_vjp() is run:
                    graph = pull.evaluate(source, group.coupling)
                    held = whole.held
                pull(source, group, [torch.zeros_like(source), torch.zeros_like(source)], True, graph)
                del graph
                most = whole.peak
            return Sizes(value.peak, held, most)
    except (torch.OutOfMemoryError, OverLimit):
        pass
    release(x.device)
    return None


def release(device: torch.device) -> None:
    """Frees what only reference cycles or the CUDA cache hold."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def relieved(run: Run, other: Run) -> Run:
    """`run`, half done, with the evaluator of a smaller one; the states it stored stay."""
    return replace(run, evaluator=other.evaluator, graph_ends=frozenset())
