"""`Chain`: a program of couplings that runs forwards and backwards and is differentiable in both directions.

It knows neither a solver nor diffusion. `run.py` does the work of a run, and `memory/strategies.py` decides what is
kept for the gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor

from .checks import Trust
from .evaluator import Evaluator
from .exact.round_trip import new_state, transport
from .exact.state import LatticeState
from .factory import ARITHMETICS, RunFactory
from .latents import check_all, check_latents
from .memory.plan import AUTO, Plan, parse_bytes
from .memory.planner import Planner
from .memory.strategies import Auto, Memory, shown, strategy_of
from .program import Coupling, Program, count_network_calls, is_invertible, num_values
from .transforms import refuse_transforms, transform_of


class Chain:
    """Runs a program of couplings on a pair of latents, forwards and backwards, with gradients in both directions.

    Latents are (B, C, ...) tensors of fp16, bf16, fp32 or fp64; results and gradients have their dtype. They are never
    changed or kept, so in-place changes between the forward and the backward pass are harmless.

    Args:
        evaluator: The function f in the couplings: an `Evaluator`, or an object that has its methods.
        program: The couplings; target 0 is x and target 1 is y.
        memory: What a forward run keeps for its gradient: a name, an int or a strategy object.

            - "checkpoint" or `Checkpoint()`: the source of every evaluation of the network.
            - an int k >= 1 or `Reversible(every=k)`: the state every k steps; couplings between are undone.
            - "reversible" or `Reversible()`: the final state alone.
            - "naive" or `Naive()`: plain autograd through everything, the oracle of the tests.
            - "auto" or `Auto(budget)`: the fastest of many plans that fits into a memory budget (see `plan`).

            The gradient is the same up to rounding. All but "naive" and "auto" evaluate the network once with a graph
            for each coupling with b != 0 in the backward pass, and not otherwise.
        state_dtype: The dtype that x, y and their cotangents are carried in, torch.float32 or torch.float64; never less
            precise than the latents. None: float64, or float32 on devices without it. Latents are tiny beside a
            network's activations, and undoing EDICT's mixing multiplies rounding errors by 1/p^2 a step.
        arithmetic: "float"; or "exact": x and y are integers of 32 bits on a lattice, and every coupling is undone to
            the bit if the network gives the same bits again, so every `memory` has the same gradient to the bit
            ("naive" is refused); or "exact64": integers of 64 bits, nearer to float64. See docs/exact.md.
        drift_tolerance: Where couplings are undone for the gradient, how far the undone start may be from the start,
            relative in the 2-norm. Above it a RuntimeWarning is given once, and the gradient is computed again from
            checkpoints. None: 0 in exact arithmetic; in floating point 1e-3 with an fp16 or bf16 network or a float32
            state, else 1e-5. `drift` has the number.
        memory_budget: For memory="auto": bytes, or a string such as "6GiB", that a gradient may take beyond what is
            there before it (weights, for instance). None: what is free on the latents' device when the chain first
            meets latents of a kind, less a tenth.

    Raises:
        ValueError: An argument cannot work, also in a call; the error names it.
        TypeError: Latents are no floating-point tensors.
        FloatingPointError: NaN or Inf appeared in a run or its gradient; the error names the coupling where it did
            first. A loss whose own gradient is not finite passes through.
        OverflowError: A run in exact arithmetic left the lattice's range. It never wraps around.

    Example:
        x1, y1 = chain(x, y)            # runs the program
        x, y = chain.inverse(x1, y1)    # undoes it
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
            fix = "Auto(budget=...)" if isinstance(memory, Auto) else '"auto"'
            raise ValueError(f"memory_budget: expected None with memory={memory!r}, got {memory_budget!r}; use {fix}")
        if drift_tolerance is not None and not (isinstance(drift_tolerance, Real) and drift_tolerance >= 0):
            raise ValueError(f"drift_tolerance: expected a number of at least 0 or None, got {drift_tolerance!r}")
        if state_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"state_dtype: expected torch.float32, torch.float64 or None, got {state_dtype!r}")
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic: expected one of {', '.join(map(repr, ARITHMETICS))}, got {arithmetic!r}")
        self._runs = RunFactory(evaluator, program, state_dtype, arithmetic, Trust(drift_tolerance))
        self._budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.memory = memory

    @property
    def runs(self) -> RunFactory:
        """What makes the chain's runs."""
        return self._runs

    @property
    def evaluator(self) -> Evaluator:
        """The function f in the couplings."""
        return self._runs.evaluator

    @property
    def program(self) -> Program:
        """The couplings; in exact arithmetic with the coefficients that the lattice represents."""
        return self._runs.program

    @property
    def state_dtype(self) -> torch.dtype | None:
        """The dtype that was asked for x, y and their cotangents; None: the default."""
        return self._runs.state_dtype

    @property
    def arithmetic(self) -> str:
        """ "float", "exact" or "exact64"."""
        return self._runs.arithmetic

    @property
    def memory(self) -> Memory:
        """The memory strategy, as it was given."""
        return self._memory

    @memory.setter
    def memory(self, value: Memory) -> None:
        strategy = strategy_of(value, self._budget)
        strategy.check(shown(value), arithmetic=self.arithmetic, invertible=self.is_invertible)
        self._memory, self._strategy, self._planner = value, strategy, strategy.new_planner(self._runs)

    @property
    def planner(self) -> Planner | None:
        """What plans the gradients' memory; None unless the strategy is "auto" or `Auto`."""
        return self._planner

    @property
    def memory_budget(self) -> int | None:
        """The budget of "auto" or `Auto` in bytes. None: what is free, or another strategy."""
        return None if self._planner is None else self._planner.budget

    @property
    def plan(self) -> Plan | None:
        """With "auto" or `Auto`: what the latest gradient was planned to keep, and what that takes; None before any."""
        return None if self._planner is None else self._planner.plan

    def make_plan(self, x: Tensor, reserve: int | None = None) -> Plan:
        """Predicts what a gradient with respect to latents like x will keep, without running the chain.

        The first call for latents of a kind measures one evaluation of the network and its VJP.

        Args:
            x: Latents (B, C, ...), or a tensor like them.
            reserve: Bytes that are taken between the forward run and the backward pass, by a decoder for instance; the
                runs that follow are planned with them too. None changes nothing: the plan is for what was last said.

        Raises:
            ValueError: The chain has another strategy than "auto" or `Auto`, or the budget cannot be met.
        """
        return self._require_planner().make_plan(x, reserve)

    def smallest_plan(self, x: Tensor) -> Plan:
        """Predicts the lowest peak that is possible for latents like x, whatever is computed again for it.

        Raises:
            ValueError: The chain has another strategy than "auto" or `Auto`.
            torch.OutOfMemoryError: Not even one evaluation of the network could be measured.
        """
        return self._require_planner().smallest_plan(x)

    def _require_planner(self) -> Planner:
        if self._planner is None:
            raise ValueError(f'memory: expected "auto" for a plan, got {self.memory!r}; make the chain with it')
        return self._planner

    @property
    def drift_tolerance(self) -> float | None:
        """The largest drift and mismatch that are accepted, as it was given; None: the defaults."""
        return self._runs.trust.tolerance

    @property
    def drift(self) -> float | None:
        """How far the latest backward pass that undid couplings missed what was stored: |undone - stored| / |stored|.

        It is the largest such distance, of the run's start and (with an int k) the stored states; 0 if all are equal to
        the bit. None before any such pass.
        """
        return self._runs.trust.drift

    @property
    def mismatch(self) -> float | None:
        """How far the network's values in the latest backward pass were from those of the forward run.

        It is an estimate of |backward - forward| / |forward| over all evaluations, and 0 if all are equal to the bit.
        It is measured where sources are stored ("checkpoint", and "auto" where it stores them); `drift` tells as much
        where couplings are undone. None before any such pass.
        """
        return self._runs.trust.mismatch

    @property
    def is_invertible(self) -> bool:
        """Whether `inverse` exists: whether no coupling forgets its target."""
        return is_invertible(self.program)

    @property
    def num_network_calls(self) -> int:
        """How often one run evaluates the network, and its gradient with a graph again."""
        return count_network_calls(self.program)

    def __repr__(self) -> str:
        size = f"{len(self.program)} couplings, {self.num_network_calls} evaluations"
        return f"{type(self).__name__}({size}, memory={self.memory!r})"

    def __call__(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the program on latents x and y, of one shape (B, C, ...), dtype and device; y=None starts from y = x."""
        return self._run(x, y, inverse=False)

    def inverse(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the inverse program, which undoes `__call__` up to rounding. Arguments and results are as there."""
        return self._run(x, y, inverse=True)

    def _run(self, x: Tensor, y: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        check_latents(x, y)
        x1, y1 = self._run_checked((x, x if y is None else y), inverse)
        return x1, y1

    def run(self, *latents: Tensor) -> tuple[Tensor, ...]:
        """Runs a program on any number of latents, of which `__call__` is the case of two.

        Args:
            *latents: One tensor (B, C, ...) for each value that the program works on, alike in shape, dtype and device.

        Returns:
            What the latents have become, in the same order.

        Raises:
            ValueError: There are more or fewer latents than the program works on, or they do not match each other.
        """
        count = num_values(self.program)
        if len(latents) != count:
            raise ValueError(
                f"latents: expected {count} tensors, one for each of the program's values, got {len(latents)}"
            )
        names = ["x", *(f"latents[{number}]" for number in range(1, count))]
        check_all(dict(zip(names, latents, strict=True)))
        return self._run_checked(latents, inverse=False)

    def _run_checked(self, latents: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, ...]:
        tensors = self.evaluator.tensors()
        if inverse and not self.is_invertible:
            raise ValueError(
                f"inverse: {type(self).__name__} cannot be inverted, because it has a step that forgets the latents "
                "before it; use a solver that can be, such as doodl_fast.EDICT"
            )
        weights = self.evaluator.weights()
        trained = set(map(id, tensors))
        self._runs.trust.note_weights([(name, weight) for name, weight in weights if id(weight) not in trained])
        inputs = (*latents, *tensors, *(weight for _, weight in weights))
        if not self._strategy.supports_transforms:
            refuse_transforms("latents, conditions and weights", *inputs)
        if transform_of(*inputs) or (torch.is_grad_enabled() and any(t.requires_grad for t in (*latents, *tensors))):
            insists = self.evaluator.insists_on_vjps
            self._strategy.check(shown(self.memory), vjp_dtype=insists, inverse=inverse)
            return self._strategy.run(self._runs, latents, tensors, inverse, self._planner)
        run = self._runs.new_run(latents[0], inverse)
        with run.evaluator.running(), torch.no_grad():
            work = run.new_arithmetic()
            state = work.enter(*latents)
            run.forward(work, state, tensors)
            work.finish()
            return work.leave(state)

    def state(self, x: Tensor, y: Tensor | None = None, end: str = "noise") -> LatticeState:
        """Rounds latents to a state that goes through the chain and back without losing a bit.

        Args:
            x: Latents (B, C, ...).
            y: The other latents, alike in shape, dtype and device; None: y = x.
            end: The end of the chain that they belong to, "noise" (where the program starts) or "image".

        Raises:
            ValueError: The chain's arithmetic is "float", or an argument cannot work.
        """
        return new_state(self._runs, x, y, end)

    def forward_state(self, state: LatticeState) -> LatticeState:
        """Takes a state from the noise to the image; `inverse_state` undoes it to the bit. It carries no gradient.

        Raises:
            TypeError: It is no state.
            ValueError: The state is at the other end or of another lattice, or the chain's arithmetic is "float".
        """
        return transport(self._runs, state, inverse=False)

    def inverse_state(self, state: LatticeState) -> LatticeState:
        """Takes a state from the image to the noise; `forward_state` undoes it to the bit. Raises as that does."""
        return transport(self._runs, state, inverse=True)


@contextlib.contextmanager
def replaced_evaluator(chain: Chain, evaluator: Evaluator) -> Iterator[None]:
    """Lets a chain call another evaluator inside the block, which must give the same values; for measurements."""
    inner = chain.evaluator
    chain.runs.evaluator = evaluator
    try:
        yield
    finally:
        chain.runs.evaluator = inner
