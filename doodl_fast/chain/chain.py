"""`Chain`: a program of couplings that runs forwards and backwards and is differentiable in both directions.

It knows neither a solver nor diffusion; the work is `engine.py`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .arithmetic import Arithmetic, Floats
from .autograd import ChainFunction
from .checks import Trust
from .evaluator import Evaluator, as_evaluator
from .exact.arithmetic import Exact
from .exact.lattice import WIDTHS, Lattice, grown, to_lattice
from .exact.state import ENDS, LatticeState, check_state, state_of
from .memory.plan import AUTO, Plan, parse_bytes
from .memory.planner import Planner, relieved
from .program import Coupling, Program, count_network_calls, invert
from .run import Memory, Run

ARITHMETICS = ("float", *WIDTHS)
STORES = ("checkpoint", "reversible", "naive", AUTO)
LATENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NO_FLOAT64 = frozenset({"mps"})


class Chain:
    """`x1, y1 = chain(x, y)` runs the program, `x, y = chain.inverse(x1, y1)` undoes it; both are differentiable.

    evaluator: the function f in the couplings (see `Evaluator`).
    program: the couplings, target 0 being x and 1 being y.
    memory: what a forward run keeps for its gradient. "checkpoint": the source of every evaluation, which is all that
        the VJP needs. An int k >= 1: the state every k steps; couplings between are undone. "reversible": the final
        state alone. "naive": plain autograd through everything, the oracle. The gradient is the same up to rounding;
        all but "naive" and "auto" make one evaluation with a graph per coupling with b != 0 in the backward pass, and
        no other. "auto": the fastest plan that fits in memory_budget, see `plan`: whole graphs of the last evaluations,
        which the backward pass needs not evaluate again, sources or states of the others, checkpointed blocks inside
        the network. Out of memory all the same (torch.OutOfMemoryError), a run goes on with a smaller plan.
    memory_budget: for "auto": bytes, or "6GiB", "500MB" and the like, that a gradient may take beyond what is there
        before it (weights, for instance). Default: what is free on the latents' device when it first meets latents of
        a shape, less a tenth.
    state_dtype: in which x, y and their cotangents are carried, torch.float32 or torch.float64; never less precise than
        the latents. Default: float64 (float32 on devices without it). Latents are tiny beside a network's activations,
        and undoing EDICT's mixing multiplies rounding errors by 1/p^2 a step.
    arithmetic: "float", or "exact": x and y are integers of 32 bits on a lattice, and every coupling is undone to the
        bit if the network gives the same bits again; any `memory` but "naive" then has the same gradient, bit for bit.
        "exact64": integers of 64 bits, nearer to float64. See `lattice.py`, and `state` for going there and back.
    drift_tolerance: where couplings are undone for the gradient (an int k, "reversible"), how far the undone start may
        be from the start, relative in the 2-norm. Above it a RuntimeWarning is given once and the gradient is computed
        again from checkpoints. Default: 0 in exact arithmetic; in floating point 1e-3 with an fp16 or bf16 network or
        a float32 state, else 1e-5. `chain.drift` has the number.

    Latents are (B, C, ...) tensors of fp16, bf16, fp32 or fp64; results and gradients have their dtype. They are never
    changed or kept: in-place changes between forward and backward are harmless.
    Raises ValueError or TypeError, naming the argument, and FloatingPointError, naming the coupling, where NaN or Inf
    first appears in a run or its gradient (a loss whose own gradient is not finite passes through). A run in exact
    arithmetic raises OverflowError when the state leaves the lattice's range; it never wraps.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        program: Sequence[Coupling],
        memory: Memory = "checkpoint",
        *,
        state_dtype: torch.dtype | None = None,
        arithmetic: str = "float",
        drift_tolerance: float | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        if memory_budget is not None and memory != AUTO:
            raise ValueError(f'memory_budget: expected None with memory={memory!r}, got {memory_budget!r}; use "auto"')
        if drift_tolerance is not None and not (isinstance(drift_tolerance, Real) and drift_tolerance >= 0):
            raise ValueError(f"drift_tolerance: expected a number of at least 0 or None, got {drift_tolerance!r}")
        if state_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"state_dtype: expected torch.float32, torch.float64 or None, got {state_dtype!r}")
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic: expected one of {', '.join(map(repr, ARITHMETICS))}, got {arithmetic!r}")
        self.evaluator = as_evaluator(evaluator)
        self._arithmetic = arithmetic
        self._lattice = None if arithmetic == "float" else to_lattice(program, arithmetic)
        self.program: Program = tuple(program) if self._lattice is None else self._lattice.program
        self.state_dtype = state_dtype
        self._planner = Planner(None if memory_budget is None else parse_bytes(memory_budget))
        self.memory = memory
        self._trust = Trust(drift_tolerance)

    @property
    def drift(self) -> float | None:
        """How far the latest backward pass that undid couplings missed the run's start (or, with an int k, a stored
        state, if that is more): |undone - start| / |start|, 0 if equal to the bit. None before any such pass."""
        return self._trust.drift

    @property
    def plan(self) -> Plan | None:
        """With memory="auto": what the latest gradient was planned to keep, and what that takes; None before any."""
        return self._planner.plan

    @property
    def memory_budget(self) -> int | None:
        """In bytes; None: what is free."""
        return self._planner.budget

    def make_plan(self, x: Tensor, reserve: int = 0) -> Plan:
        """The plan for a gradient with respect to latents like x (B, C, ...), without running the chain.

        Measures one evaluation of the network and its VJP, unless it has for latents of that shape, dtype and device.
        reserve: bytes that are taken between the forward run and the backward pass, by a decoder for instance; also for
        the runs that follow. Raises ValueError for another `memory` than "auto", and when the budget cannot be met.
        """
        self._check_auto(x)
        self._planner.reserve = reserve
        return self._planner.choose(*self._case(x, inverse=False))

    def smallest_plan(self, x: Tensor) -> Plan:
        """The plan of the lowest peak for latents like x, whatever it computes again. Raises as `make_plan`."""
        self._check_auto(x)
        return self._planner.smallest(*self._case(x, inverse=False))

    def make_smaller_plan(self, x: Tensor) -> Plan | None:
        """After running out of memory elsewhere: the next smaller plan for latents like x; None if there is none."""
        return self._planner.shrink(*self._case(x, inverse=False))

    def _check_auto(self, x: Tensor) -> None:
        if self.memory != AUTO:
            raise ValueError(f'memory: expected "auto" for a plan, got {self.memory!r}; make the chain with it')
        _check_latents(x, None)

    @property
    def arithmetic(self) -> str:
        return self._arithmetic

    @property
    def memory(self) -> Memory:
        return self._memory

    @memory.setter
    def memory(self, value: Memory) -> None:
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_count and not (isinstance(value, str) and value in STORES):
            raise ValueError(
                f"memory: expected one of {', '.join(map(repr, STORES))} or an int of at least 1, got {value!r}"
            )
        if value == "naive" and self._lattice is not None:
            raise ValueError(
                f'memory: "naive" is plain autograd, which cannot pass the rounding of arithmetic={self.arithmetic!r}; '
                'use "checkpoint", an int or "reversible"'
            )
        self._memory = value

    @property
    def num_network_calls(self) -> int:
        """Evaluations of one run, and again, with a graph, of its gradient."""
        return count_network_calls(self.program)

    def __repr__(self) -> str:
        size = f"{len(self.program)} couplings, {self.num_network_calls} evaluations"
        return f"{type(self).__name__}({size}, memory={self.memory!r})"

    def __call__(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the program on x, y of one shape (B, C, ...), dtype and device; `y=None` is a tied start, y = x."""
        return self._run(x, y, inverse=False)

    def inverse(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the inverse program: undoes `__call__` up to rounding. Arguments and results as there."""
        return self._run(x, y, inverse=True)

    def state(self, x: Tensor, y: Tensor | None = None, end: str = "noise") -> LatticeState:
        """Latents as a state that goes through the chain and back without losing a bit.

        x, y: as in `__call__`. end: which end of the chain they belong to, "noise" (where the program starts) or
        "image". Rounds them to the lattice once and gives them empty buffers. For exact arithmetic.
        """
        if end not in ENDS:
            raise ValueError(f"end: expected one of {', '.join(map(repr, ENDS))}, got {end!r}")
        lattice = self._require_lattice()
        _check_latents(x, y)
        with torch.no_grad():
            work = self._plan(x, end == "image", store=False).new_arithmetic()
            tensors = work.enter(x, x if y is None else y)
            work.finish()
        return state_of(tensors, end, x.dtype, lattice.units[end], self._fingerprint(lattice))

    def forward_state(self, state: LatticeState) -> LatticeState:
        """Takes a state from the noise to the image: what `inverse_state` undoes, and undoes it, to the bit.

        Runs without gradient. Raises ValueError or TypeError for a state of the other end or of another lattice.
        """
        return self._through(state, inverse=False)

    def inverse_state(self, state: LatticeState) -> LatticeState:
        """Takes a state from the image to the noise; as `forward_state`."""
        return self._through(state, inverse=True)

    def _run(self, x: Tensor, y: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        _check_latents(x, y)
        y = x if y is None else y
        tensors = self.evaluator.tensors()
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, *tensors))
        if differentiable and self.memory == "naive" and self.evaluator.insists_on_vjps:
            raise ValueError(
                'memory: "naive" differentiates the very calls that it ran, so it cannot take VJPs in vjp_dtype; use '
                '"checkpoint" or a Denoiser with vjp_dtype=None'
            )
        apply: Callable[..., tuple[Tensor, Tensor]] = ChainFunction.apply  # untyped in torch
        if differentiable and self.memory == AUTO:
            return self._run_planned(lambda run: apply(run, x, y, *tensors), x, inverse)
        run = self._plan(x, inverse, store=differentiable and self.memory != "naive")
        if run.stores:
            return apply(run, x, y, *tensors)
        with self.evaluator.running(), torch.set_grad_enabled(differentiable):
            if differentiable:
                # autograd keeps the conditions: copies leave the caller free to change his own
                tensors = tuple(t.clone() for t in tensors)
            work = run.new_arithmetic()
            state = work.enter(x, y)
            run.plain_forward(state, tensors) if differentiable else run.forward(work, state, tensors)
            work.finish()
            return work.leave(state)

    def _run_planned(self, go: Callable[[Run], tuple[Tensor, Tensor]], x: Tensor, inverse: bool) -> Any:
        """`go(run)` of the plan that fits, and of smaller ones while memory runs out."""
        case = self._case(x, inverse)
        plan = self._planner.choose(*case)

        def relieve(run: Run) -> Run | None:
            smaller = self._planner.shrink(*case)
            return None if smaller is None else relieved(run, self._plan(x, inverse, True, smaller))

        while True:
            try:
                return go(replace(self._plan(x, inverse, True, plan), relieve=relieve))
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # which holds what the run had made
            smaller = self._planner.shrink(*case)
            if smaller is None:
                raise failure
            plan = smaller

    def _case(self, x: Tensor, inverse: bool) -> tuple[Run, Tensor, Callable[[], Run | None]]:
        """What the planner asks for. Of x it gets a stand-in that takes no memory, as it may be kept."""
        x = x.detach().new_zeros(()).expand(x.shape)
        whole = Plan(0, "checkpoint", False, 0, 0, 0, 0)

        def blocks() -> Run | None:
            lean = self.evaluator.for_blocks()
            return None if lean is None else self._plan(x, inverse, True, replace(whole, blocks=True))

        return self._plan(x, inverse, True, whole), x, blocks

    def _through(self, state: LatticeState, inverse: bool) -> LatticeState:
        lattice = self._require_lattice()
        start, end = ENDS[::-1] if inverse else ENDS
        check_state(state, start, self._fingerprint(lattice))
        words = grown(invert(self.program) if inverse else self.program, state.bounds())
        run = self._plan(state.x.new_empty(0, dtype=state.latents_dtype), inverse, store=False)
        with self.evaluator.running(), torch.no_grad():
            work = run.new_arithmetic()
            tensors = state.with_words(words).tensors()
            run.forward(work, tensors, self.evaluator.tensors())
            work.finish()
        return state_of(tensors, end, state.latents_dtype, lattice.units[end], state.fingerprint)

    def _require_lattice(self) -> Lattice:
        if self._lattice is None:
            raise ValueError(
                'arithmetic: states need exact arithmetic, and this chain has "float"; make it with arithmetic="exact"'
            )
        return self._lattice

    def _fingerprint(self, lattice: Lattice) -> str:
        return f"{lattice.fingerprint} {self.state_dtype or torch.float64}"

    def _plan(self, x: Tensor, inverse: bool, store: bool, plan: Plan | None = None) -> Run:
        """x: latents, or any tensor of their dtype and device. plan: for a gradient with memory="auto"."""
        program = invert(self.program) if inverse else self.program
        no_float64 = x.device.type in NO_FLOAT64
        state_dtype = torch.promote_types(self.state_dtype or (torch.float32 if no_float64 else torch.float64), x.dtype)
        arithmetic: Callable[[], Arithmetic] = functools.partial(Floats, x.dtype, state_dtype)
        if self._lattice is not None:
            if no_float64:
                raise ValueError(f'arithmetic: exact arithmetic needs float64, which {x.device} lacks; use "float"')
            ends = ENDS[::-1] if inverse else ENDS
            arithmetic = functools.partial(Exact, self._lattice, program, ends, grown(program), x.dtype, state_dtype)
        evaluator, memory, graphs = self.evaluator, self.memory, 0
        if plan is not None:
            memory, graphs = plan.states, plan.graphs
            evaluator = (evaluator.for_blocks() if plan.blocks else None) or evaluator
        return Run.plan(evaluator, program, memory, x, state_dtype, arithmetic, store, self._trust, graphs)


def _check_latents(x: Tensor, y: Tensor | None) -> None:
    latents = {"x": x} if y is None else {"x": x, "y": y}
    for name, latent in latents.items():
        if not isinstance(latent, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(latent).__name__}")
        if latent.dtype not in LATENT_DTYPES:
            raise TypeError(
                f"{name}: expected a tensor of fp16, bf16, fp32 or fp64, got {latent.dtype}; convert it with .float()"
            )
        if latent.ndim < 2:
            raise ValueError(
                f"{name}: expected shape (B, C, ...), got {tuple(latent.shape)}; add a batch dimension, {name}[None]"
            )
    if y is not None:
        for what in ("shape", "dtype", "device"):
            expected, got = getattr(x, what), getattr(y, what)
            if expected != got:
                fix = "y=None starts from y = x" if what == "shape" else f"use y.to(x.{what})"
                raise ValueError(f"y: expected x's {what} {_tuple(expected)}, got {_tuple(got)}; {fix}")
    finite = torch.stack([torch.isfinite(latent.detach()).all() for latent in latents.values()])
    if not finite.all():  # the only synchronisation of a run
        name = next(name for name, good in zip(latents, finite.tolist(), strict=True) if not good)
        raise ValueError(
            f"{name}: expected finite latents, got NaN or Inf; check the image, noise or update that made them"
        )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value
