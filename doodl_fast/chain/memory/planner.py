"""The planner of the strategy `Auto`: it measures one evaluation of a chain's network and picks the plan that fits.

When memory runs out all the same, it picks a smaller plan.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import explain_first_evaluation
from ..evaluator import Recordings
from ..factory import RunFactory
from ..latents import check_latents
from ..program import count_network_calls, is_invertible, step_boundaries
from ..pull import NetworkPull
from ..run import ProgramRun
from ..ways import WHOLE, Way
from .plan import ANCHOR_STEPS, Plan, Sizes, Workload, format_bytes, free_bytes
from .tracker import OverLimit, Tracker, meter

MOST_CASES = 16
"""How many kinds of latents a planner remembers its measurements of; the one that was used longest ago is dropped."""


class Measured:
    """Sizes of one evaluation of a chain's network, each measured when it is first asked for.

    Args:
        runs: Makes the chain's runs.
        x: A tensor of the latents' shape, dtype and device.
        inverse: The direction of the runs.
        limit: A measurement that would take more bytes than this is abandoned. None: no limit.
    """

    def __init__(self, runs: RunFactory, x: Tensor, inverse: bool, limit: int | None) -> None:
        self._runs, self._x, self._inverse, self._limit = runs, x, inverse, limit
        self._known: dict[Way, Probe | None] = {}

    def __call__(self, way: Way) -> Sizes | None:
        """The sizes in one way; None where they cannot be had."""
        found, whole = self._probed(way), self._probed(WHOLE)
        return None if found is None else found.sizes(way, whole)

    def _probed(self, way: Way) -> Probe | None:
        if way not in self._known:
            self._known[way] = None
            if way.of(self._runs.evaluator) is not None:
                run = self._runs.new_run(self._x, self._inverse, stores=True, way=way)
                self._known[way] = probe(run, self._x, self._limit, way.blocks)
        return self._known[way]


@dataclass
class Case:
    """What a planner knows of gradients with respect to latents of one kind.

    Attributes:
        runs: Makes the chain's runs.
        x: A tensor of the latents' shape, dtype and device that takes next to no memory.
        inverse: The direction of the runs.
        workload: The gradient in numbers. It has no sizes of what is larger than the budget, as nothing may take that
            much, a measurement included.
        unlimited: The sizes without that limit, for the error that names the smallest possible budget.
        budget: In bytes.
        plan: The latest plan. One that ran out of memory is replaced by a smaller one.
        reserve: What that plan was made for.
        replayed: What a call, its replay, a call with its VJP and its replay take in seconds; None if that was not
            measured yet, False if calls cannot be replayed.
    """

    runs: RunFactory
    x: Tensor
    inverse: bool
    workload: Workload
    unlimited: Measured
    budget: int
    plan: Plan | None = None
    reserve: int = -1
    replayed: tuple[float, ...] | bool | None = None

    @property
    def recordings(self) -> Recordings | None:
        """The recordings of the network's calls; None if none are made."""
        return self.runs.evaluator.recordings(self.x.device)

    def new_run(self, plan: Plan) -> ProgramRun:
        """A run that keeps what a plan says."""
        launched = not plan.recordings and self.recordings is not None
        options = {"states": plan.states, "graphs": plan.graphs, "way": plan.way, "launched": launched}
        return self.runs.new_run(self.x, self.inverse, stores=True, **options)  # type: ignore[arg-type]

    def smallest(self, reserve: int) -> Plan | None:
        """The plan of the lowest peak, whatever the budget; None where not even one evaluation can be measured."""
        return replace(self.workload, sizes=self.unlimited).smallest(reserve)

    def current(self, reserve: int) -> Plan:
        """The plan for a reserve, made anew if the latest one is for another. Raises as `_fitting`."""
        if self.plan is None or self.reserve != reserve:
            self.plan, self.reserve = self._fitting(reserve), reserve
        return self.plan

    def _fitting(self, reserve: int) -> Plan:
        """The plan with the least recomputation that fits. Raises ValueError, naming the smallest possible budget."""
        other = self.workload.fastest(self.budget, reserve)
        plan = self._replaying(reserve, other) or other
        if plan is not None:
            return plan
        smallest = self.smallest(reserve)
        least = "even one evaluation ran out of memory" if smallest is None else f"at least {smallest.peak} bytes"
        size = "" if smallest is None else f" ({format_bytes(smallest.peak)}), the smallest possible"
        raise ValueError(
            f"memory_budget: expected {least}{size} for latents of shape {tuple(self.x.shape)}, got {self.budget} "
            f"({format_bytes(self.budget)}); give more, or use smaller or fewer latents or a network of half precision"
        )

    def _replaying(self, reserve: int, other: Plan | None) -> Plan | None:
        """The plan in which calls are replayed, if they can be, recordings fit, and it is faster than another plan."""
        recordings = self.recordings
        if recordings is None or self.replayed is False:
            return None
        plan = self.workload.replayed(reserve)
        if plan is None or plan.peak > self.budget:
            recordings.refuse('the plan of memory="auto" has no room for recordings')
            return None
        if self.replayed is None:
            self.replayed = rehearse(self.new_run(plan), self.x, recordings) or False
        if not isinstance(self.replayed, tuple):
            return None
        call, replay, call_and_vjp, replay_and_vjp = self.replayed
        if other is not None and other.seconds(call, call_and_vjp) < plan.seconds(replay, replay_and_vjp):
            recordings.refuse('the plan of memory="auto" keeps graphs, and so is faster without replays')
            recordings.clear()
            return None
        return plan


class Planner:
    """Plans the gradients of one chain that has the strategy `Auto`. `chain.planner` is it.

    Args:
        runs: Makes the chain's runs.
        budget: In bytes. None: what is free when latents of a kind are first met, less a tenth.

    Attributes:
        plan: What the latest gradient was planned to keep; None before any.
        reserve: Bytes that are taken between a forward run and its backward pass, by a decoder and a guide.
    """

    def __init__(self, runs: RunFactory, budget: int | None) -> None:
        self.budget, self.reserve = budget, 0
        self.plan: Plan | None = None
        self._runs = runs
        self._cases: dict[Hashable, Case] = {}
        self._warned = False

    def make_plan(self, x: Tensor, reserve: int | None = None) -> Plan:
        """See `Chain.make_plan`."""
        check_latents(x, None)
        if reserve is not None and (isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 0):
            raise ValueError(f"reserve: expected an int of at least 0, in bytes, or None, got {reserve!r}")
        case = self.case(x)
        if reserve is None:
            return case.current(self.reserve)
        self.reserve = reserve
        return self.choose(case)

    def smallest_plan(self, x: Tensor) -> Plan:
        """See `Chain.smallest_plan`."""
        check_latents(x, None)
        plan = self.case(x).smallest(self.reserve)
        if plan is None:
            raise torch.OutOfMemoryError("memory: one evaluation of the network and its VJP ran out of it")
        return plan

    def make_smaller_plan(self, x: Tensor) -> Plan | None:
        """After running out of memory outside the chain: the next smaller plan for latents like x, which later
        gradients use; None if there is none."""
        return self.shrink(self.case(x))

    def case(self, x: Tensor, inverse: bool = False) -> Case:
        """What is known of gradients with respect to latents like x."""
        run = self._runs.new_run(x, inverse, stores=True)
        wanted = tuple(t.requires_grad for t in run.evaluator.tensors())
        key = (x.shape, x.dtype, x.device, wanted, str(run.autocast))
        case = self._cases.pop(key, None) or self._new_case(run, x, inverse)
        self._cases[key] = case  # Now it is the last in the dict, where the first is the one unused for longest.
        while len(self._cases) > MOST_CASES:
            self._cases.pop(next(iter(self._cases)), None)
        return case

    def _new_case(self, run: ProgramRun, x: Tensor, inverse: bool) -> Case:
        x = x.detach().new_zeros(()).expand(x.shape)
        budget = free_bytes(x.device) if self.budget is None else self.budget
        limited, unlimited = (Measured(self._runs, x, inverse, limit) for limit in (budget, None))
        return Case(self._runs, x, inverse, workload(run, x, limited), unlimited, budget)

    def choose(self, case: Case) -> Plan:
        """The plan for a gradient that is about to run. Raises ValueError, naming the smallest possible budget."""
        self.plan = case.current(self.reserve)
        return self.plan

    def shrink(self, case: Case) -> Plan | None:
        """After running out of memory: the next smaller plan; None if there is none. Frees what can be freed, and warns
        the first time."""
        before = case.plan or case.current(self.reserve)
        recordings = case.recordings
        if recordings is not None:
            case.replayed = False
            recordings.clear()
            if before.recordings:
                recordings.refuse("memory ran out beside the recordings")
        release(case.x.device)
        after = case.workload.smaller(before, self.reserve)
        if after is None:
            return None
        self.plan = case.plan = after
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"memory: ran out of it with {before.kept} (predicted {format_bytes(before.peak)}); going on with "
                f"{after.kept}{', blocks checkpointed' if after.way.blocks else ''} (predicted "
                f"{format_bytes(after.peak)}). Said once per chain; chain.plan has the latest",
                RuntimeWarning,
                stacklevel=2,
            )
        return after


def workload(run: ProgramRun, x: Tensor, sizes: Callable[[Way], Sizes | None]) -> Workload:
    """The workload of a gradient of `run` with respect to latents like x."""
    work = run.new_arithmetic()
    latents = [x.detach()] * run.num_latents
    state = work.enter(*latents)
    undoing = ("reversible" if work.exact else ANCHOR_STEPS,) if is_invertible(run.program) else ()
    return Workload(
        evaluations=count_network_calls(run.program),
        steps=len(step_boundaries(run.program, 1)),
        source=x.numel() * run.state_dtype.itemsize,
        state=sum(z.numel() * z.element_size() for z in state),
        # Undoing couplings is free of drift in exact arithmetic alone.
        states=("checkpoint", *undoing),
        sizes=sizes,
        graphs=run.for_vjp() is run,
    )


class Probe(NamedTuple):
    """What one evaluation of a network and one VJP of it took.

    Attributes:
        value: See `Sizes`, like graph and pull. In bytes.
        forward: The floating-point operations of the evaluation without a graph.
        both: Those of the evaluation with a graph and its VJP.
    """

    value: int
    graph: int
    pull: int
    forward: int
    both: int

    def sizes(self, way: Way, whole: Probe | None) -> Sizes:
        """The sizes of the way that was probed, beside what was probed with whole graphs, if that could be."""
        again = float(way != WHOLE)  # for a network of which no operation is counted
        if self.forward:
            # A VJP with regard to inputs takes about what the evaluation takes.
            once = 2 * self.forward if whole is None else whole.both
            again = max(0, self.both - once) / self.forward
        return Sizes(self.value, self.graph, self.pull, again)


@torch.inference_mode(False)
@torch.no_grad()
def probe(run: ProgramRun, x: Tensor, limit: int | None = None, blocks: bool = False) -> Probe | None:
    """Measures one evaluation of a run's network at latents x, and one VJP of it.

    Args:
        run: The run.
        x: Latents, of which nothing but the shape, dtype and device matters.
        limit: A measurement that would take more bytes than this is abandoned.
        blocks: Whether the run's network checkpoints its blocks. Then it is checked that it computes the same.

    Returns:
        What was measured; None if memory ran out, if `limit` was met, or if checkpointed blocks compute something else.
    """
    group = next((group for group in run.groups if group.calls_network), None)
    if group is None or group.coupling is None:
        return Probe(0, 0, 0, 0, 0)
    try:
        with run.evaluator.running():
            tensors = run.evaluator.tensors()
            source = x.detach().to(run.state_dtype, copy=True)
            pull = NetworkPull(run, [t.clone() for t in tensors], [t.requires_grad for t in tensors])
            # What a plan does not count, such as these copies, does not count against the limit either.
            with Tracker(x.device.type, limit=limit) as tracker:
                with meter(x.device) as value, explain_first_evaluation(run.evaluator, source):
                    plain = run.evaluate(source, group.coupling, tensors).value
                forward = tracker.flops
                graph, held = None, 0
                with meter(x.device) as whole:
                    if run.for_vjp() is run:
                        graph = pull.evaluate(source, group.coupling)
                        held = whole.held
                        if blocks and not _is_close(graph.eps.value, plain):
                            return None
                    pull(source, group, [torch.zeros_like(source) for _ in range(run.num_latents)], True, graph)
                    del graph
                    most = whole.peak
            return Probe(value.peak, held, most, forward, tracker.flops - forward)
    except (torch.OutOfMemoryError, OverLimit):
        pass
    release(x.device)
    return None


@torch.inference_mode(False)
@torch.no_grad()
def rehearse(run: ProgramRun, x: Tensor, recordings: Recordings) -> tuple[float, ...] | None:
    """Evaluates a run's network once, and once with its VJP, as all evaluations will be, so that both are recorded.

    Returns:
        See `Case.replayed`; None if not both were replayed. Then what was recorded is freed.
    """
    group = next((group for group in run.groups if group.calls_network), None)
    if group is None or group.coupling is None:
        return None
    seconds: list[tuple[float, float] | None] = []
    try:
        with run.evaluator.running():
            tensors = run.evaluator.tensors()
            source = x.detach().to(run.state_dtype, copy=True)
            pull = NetworkPull(run, [t.clone() for t in tensors], [t.requires_grad for t in tensors])
            run.evaluate(source, group.coupling, tensors)
            seconds.append(recordings.seconds)
            pull(source, group, [torch.zeros_like(source) for _ in range(run.num_latents)], False)
            seconds.append(recordings.seconds)
    except torch.OutOfMemoryError:
        recordings.refuse("memory ran out while calls were recorded")
    found = [number for pair in seconds if pair is not None for number in pair]
    if len(found) == 4:
        return tuple(found)
    recordings.clear()
    release(x.device)
    return None


def _is_close(checkpointed: Tensor, plain: Tensor) -> bool:
    """Whether a network computes the same with checkpointed blocks, as it should; warns if not.

    Some blocks of diffusers drop an argument when they checkpoint.
    """
    if plain.is_meta:
        return True
    error = float((checkpointed.detach().float() - plain.float()).norm() / plain.float().norm())
    if not error > torch.finfo(plain.dtype).eps ** 0.5:
        return True
    warnings.warn(
        f"unet: it computes something else when its blocks are checkpointed (off by {error:.2g}), so plans of memory "
        "do without that; this is an error of the network's code",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def release(device: torch.device) -> None:
    """Frees what only reference cycles or the CUDA cache hold."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def without_graphs(run: ProgramRun, smaller: ProgramRun) -> ProgramRun:
    """A run whose backward pass is half done, to be finished with a smaller run's evaluator and without kept graphs.

    The states that it stored stay.
    """
    return replace(run, evaluator=smaller.evaluator, graph_makers={})
