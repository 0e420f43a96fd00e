"""Memory strategies: what a chain keeps of a forward run for its gradient, and what it computes again.

A strategy is an immutable object. The strings and ints that `Chain` accepts as `memory` stand for strategies:

    "checkpoint"    Checkpoint()
    "reversible"    Reversible()
    k (an int)      Reversible(every=k)
    "naive"         Naive()
    "auto"          Auto(budget=memory_budget)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..autograd import run_as_node
from ..factory import RunFactory
from ..run import ProgramRun
from .plan import AUTO, parse_bytes
from .planner import Planner, without_graphs

Latents = tuple[Tensor, ...]


class MemoryStrategy(ABC):
    """Decides what a chain keeps between a forward run and its backward pass.

    Strategies are immutable and keep nothing of the chains that use them, so many chains may share one.

    Attributes:
        supports_exact_arithmetic: Whether it goes with arithmetic="exact" and "exact64".
        supports_vjp_dtype: Whether it can take the network's VJPs in another dtype than its values, as
            `Denoiser(vjp_dtype=...)` asks for.
        supports_inverse: Whether `chain.inverse` can be differentiated.
        supports_transforms: Whether it works under torch.func's transforms, torch.vmap and forward-mode AD.
        undoes_couplings: Whether the backward pass may undo couplings instead of reading what was stored. Then the
            network must give the same bits when it is called again (see `Chain`'s drift_tolerance).
        needs_invertible: Whether it cannot do without undoing couplings.
    """

    supports_exact_arithmetic: ClassVar[bool] = True
    supports_vjp_dtype: ClassVar[bool] = True
    supports_inverse: ClassVar[bool] = True
    supports_transforms: ClassVar[bool] = False
    undoes_couplings: ClassVar[bool] = False
    needs_invertible: ClassVar[bool] = False

    @abstractmethod
    def run(
        self, runs: RunFactory, latents: Latents, tensors: Sequence[Tensor], inverse: bool, planner: Planner | None
    ) -> Latents:
        """Runs a chain so that the result can be differentiated.

        Args:
            runs: Makes the chain's runs.
            latents: Everything that the program works on, most often x and y: tensors (B, C, ...) of one shape, dtype
                and device, already checked.
            tensors: The evaluator's own tensors, which get gradients if they require them.
            inverse: Whether to run from the image to the noise.
            planner: What `new_planner` returned for this chain.

        Returns:
            The latents at the other end, as nodes of the caller's autograd graph.
        """

    def new_planner(self, runs: RunFactory) -> Planner | None:
        """What the strategy needs to remember about one chain. The chain keeps it; most strategies need nothing."""
        return None

    def check(
        self,
        shown: str,
        arithmetic: str = "float",
        vjp_dtype: bool = False,
        inverse: bool = False,
        invertible: bool = True,
    ) -> None:
        """Raises ValueError for what the strategy does not support.

        Args:
            shown: How the error names the strategy.
            arithmetic: The chain's arithmetic.
            invertible: Whether every coupling of the program can be undone.
            vjp_dtype: Whether the evaluator insists on VJPs in a dtype of their own.
            inverse: Whether the inverse run is to be differentiated.
        """
        if arithmetic != "float" and not self.supports_exact_arithmetic:
            raise ValueError(f'memory: {shown} does not support arithmetic={arithmetic!r}; use "checkpoint"')
        if vjp_dtype and not self.supports_vjp_dtype:
            raise ValueError(f'memory: {shown} does not support vjp_dtype; use "checkpoint"')
        if not invertible and self.needs_invertible:
            raise ValueError(
                f"memory: {shown} undoes couplings, and this solver has some that forget their target; use "
                '"checkpoint" or "auto"'
            )
        if inverse and not self.supports_inverse:
            raise ValueError(f'memory: {shown} does not support gradients of chain.inverse; use "checkpoint"')


@dataclass(frozen=True)
class Checkpoint(MemoryStrategy):
    """Stores the source of every evaluation of the network, and evaluates it again with a graph in the backward pass.

    The same as memory="checkpoint". The sources are one latent an evaluation, which is all that the vector-Jacobian
    products need. Nothing is undone, so nothing can drift.
    """

    def run(
        self, runs: RunFactory, latents: Latents, tensors: Sequence[Tensor], inverse: bool, planner: Planner | None
    ) -> Latents:
        return run_as_node(runs.new_run(latents[0], inverse, stores=True), latents, tensors)


@dataclass(frozen=True)
class Reversible(MemoryStrategy):
    """Stores few states and undoes the couplings between them (Gomez et al., arXiv 1707.04585).

    The same as memory="reversible", or memory=k. Each evaluation in the backward pass undoes its coupling and gives
    its vector-Jacobian product, so there are no more evaluations than with `Checkpoint`.

    Args:
        every: The number of steps, at least 1, between stored states. None stores the final state alone.

    Raises:
        ValueError: `every` is neither None nor an int of at least 1.
    """

    every: int | None = None
    undoes_couplings: ClassVar[bool] = True
    needs_invertible: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.every is not None and not _is_count(self.every):
            raise ValueError(f"every: expected an int of at least 1 or None, got {self.every!r}")

    def run(
        self, runs: RunFactory, latents: Latents, tensors: Sequence[Tensor], inverse: bool, planner: Planner | None
    ) -> Latents:
        states = "reversible" if self.every is None else self.every
        return run_as_node(runs.new_run(latents[0], inverse, stores=True, states=states), latents, tensors)


@dataclass(frozen=True)
class Naive(MemoryStrategy):
    """Differentiates the whole chain with plain PyTorch autograd, which keeps every network graph.

    The same as memory="naive". It serves as the oracle that the other strategies are tested against, and gives second
    derivatives.
    """

    supports_exact_arithmetic: ClassVar[bool] = False
    supports_vjp_dtype: ClassVar[bool] = False
    supports_transforms: ClassVar[bool] = True

    def check(
        self,
        shown: str,
        arithmetic: str = "float",
        vjp_dtype: bool = False,
        inverse: bool = False,
        invertible: bool = True,
    ) -> None:
        if arithmetic != "float":
            raise ValueError(
                f"memory: {shown} is plain autograd, which cannot pass the rounding of arithmetic={arithmetic!r}; use "
                '"checkpoint", an int or "reversible"'
            )
        if vjp_dtype:
            raise ValueError(
                f"memory: {shown} differentiates the very calls that it ran, so it cannot take VJPs in vjp_dtype; use "
                '"checkpoint" or a Denoiser with vjp_dtype=None'
            )

    def run(
        self, runs: RunFactory, latents: Latents, tensors: Sequence[Tensor], inverse: bool, planner: Planner | None
    ) -> Latents:
        run = runs.new_run(latents[0], inverse)
        run = replace(run, evaluator=run.evaluator.plain())
        with run.evaluator.running():
            # Autograd keeps the evaluator's tensors. Copies leave the caller free to change them before the backward.
            tensors = tuple(t.clone() for t in tensors)
            work = run.new_arithmetic()
            state = work.enter(*latents)
            run.plain_forward(state, tensors)
            work.finish()
            return work.leave(state)


@dataclass(frozen=True)
class Auto(MemoryStrategy):
    """Picks the fastest way to a gradient that fits into a memory budget; see docs/memory.md.

    The same as memory="auto" with memory_budget. Whole graphs of the last evaluations are kept as far as they fit;
    beyond that come sources, states, and checkpointed blocks inside the network. `chain.plan` tells what was picked.
    When a run is out of memory all the same (torch.OutOfMemoryError), it goes on with a smaller plan.

    Args:
        budget: What a gradient may take beyond what is there before it (weights, for instance), in bytes or as a
            string such as "6GiB" or "500MB". None: what is free on the latents' device when the chain first meets
            latents of a kind, less a tenth.

    Raises:
        TypeError: `budget` is neither None, an int nor a string.
        ValueError: `budget` is a string that is no size, or is below 1 byte or above 1 EiB.
    """

    budget: int | str | None = None
    undoes_couplings: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.budget is not None:
            parse_bytes(self.budget, "budget")

    def new_planner(self, runs: RunFactory) -> Planner:
        return Planner(runs, None if self.budget is None else parse_bytes(self.budget, "budget"))

    def run(
        self, runs: RunFactory, latents: Latents, tensors: Sequence[Tensor], inverse: bool, planner: Planner | None
    ) -> Latents:
        assert planner is not None
        case = planner.case(latents[0], inverse)
        plan = planner.choose(case)

        def fallback(run: ProgramRun) -> ProgramRun | None:
            smaller = planner.shrink(case)
            return None if smaller is None else without_graphs(run, case.new_run(smaller))

        while True:
            try:
                return run_as_node(replace(case.new_run(plan), fallback=fallback), latents, tensors)
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # The traceback holds the tensors that the failed run made.
            smaller = planner.shrink(case)
            if smaller is None:
                raise failure
            plan = smaller


Memory = str | int | MemoryStrategy
"""What `Chain` accepts as `memory`."""
STRATEGIES: dict[str, Callable[[], MemoryStrategy]] = {
    "checkpoint": Checkpoint,
    "reversible": Reversible,
    "naive": Naive,
    AUTO: Auto,
}


def strategy_of(memory: Memory, budget: int | None = None) -> MemoryStrategy:
    """The strategy that a `memory` argument stands for.

    Args:
        memory: A name, an int of at least 1 or a strategy.
        budget: The budget in bytes of the strategy that "auto" stands for.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(memory, MemoryStrategy):
        return memory
    if isinstance(memory, str) and memory in STRATEGIES:
        return Auto(budget) if memory == AUTO else STRATEGIES[memory]()
    if isinstance(memory, int) and _is_count(memory):
        return Reversible(memory)
    raise ValueError(
        f"memory: expected one of {', '.join(map(repr, STRATEGIES))} or an int of at least 1, got {memory!r}; or give "
        "a strategy object such as doodl_fast.Checkpoint()"
    )


def shown(memory: Memory) -> str:
    """How errors print a `memory` argument."""
    return f'"{memory}"' if isinstance(memory, str) else repr(memory)


def _is_count(value: object) -> bool:
    """Whether a value is an int of at least 1. True is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
