"""Evaluations of the network with a graph, and cotangents that are pulled back through them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import arithmetic
from .arithmetic import Eps, Group
from .checks import Watch
from .evaluator import Evaluator
from .program import Coupling, Program


class NetworkRun(Protocol):
    """What this module asks of a run of a program; `run.ProgramRun` has it, and imports this module."""

    @property
    def evaluator(self) -> Evaluator: ...
    @property
    def program(self) -> Program: ...
    @property
    def state_dtype(self) -> torch.dtype: ...
    @property
    def network_dtype(self) -> torch.dtype: ...
    @property
    def half(self) -> bool: ...
    def for_vjp(self) -> NetworkRun: ...
    def calling(self) -> AbstractContextManager[Any]: ...
    def evaluate(self, source: Tensor, coupling: Coupling, tensors: Sequence[Tensor]) -> Eps: ...


class NetworkGraph(NamedTuple):
    """One evaluation of f with its graph, which leads from `eps` to `leaf` and to the evaluator's `wanted` tensors."""

    leaf: Tensor
    wanted: list[Tensor]
    eps: Eps


Graphs = dict[int, NetworkGraph]
"""Network graphs by the end of the group that the evaluation belongs to, counted in couplings of the program."""


class NetworkPull:
    """Evaluates f once with a graph: gives its value and pulls a cotangent back through it.

    An evaluator whose VJPs are taken of another one is evaluated a second time where its value is wanted.

    Args:
        run: The run that the evaluations belong to.
        tensors: The evaluator's own tensors.
        wanted: Which of them want gradients.

    Attributes:
        sums: The gradients of the wanted tensors so far, in the state's dtype; None where there is none yet.
        latest: The output of the latest evaluation that this pass made itself; None if it came with a kept graph.
    """

    def __init__(self, run: NetworkRun, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self.value, self.run = run, run.for_vjp()
        self.watch = Watch(run.program, "VJP", self.run.network_dtype)
        self.tensors = [t.detach().requires_grad_() if want else t for t, want in zip(tensors, wanted, strict=True)]
        self.wanted = [t for t, want in zip(self.tensors, wanted, strict=True) if want]
        self.sums: list[Tensor | None] = [None] * len(self.wanted)
        self.latest: Tensor | None = None

    def __call__(
        self, source: Tensor, group: Group, cotangents: list[Tensor], undoing: bool, graph: NetworkGraph | None = None
    ) -> Eps | None:
        """Takes the cotangents back through a whole group, in place of the list's entries.

        Args:
            source: Where f is evaluated.
            group: A group whose coupling calls the network.
            cotangents: Those of x and y after the group.
            undoing: Whether the coupling is to be undone, so that f's value is needed.
            graph: Of an evaluation at that source, which is not repeated then.

        Returns:
            f at the source; None if VJPs are taken of another evaluator and the value is not needed.
        """
        assert group.coupling is not None
        self.latest = None
        if self.value is self.run:
            made = graph or self.evaluate(source, group.coupling)
            eps = self._pull(made, group, cotangents)
            self.latest = eps.value if graph is None else None
            return eps
        # The context lasts to the end of the VJP, as a network that checkpoints its blocks calls them again in it.
        with self.run.evaluator.running():
            self.latest = self._pull(self.evaluate(source, group.coupling), group, cotangents).value
        if not undoing:
            return None
        with self.value.calling():
            return self.value.evaluate(source, group.coupling, self.tensors).detach()

    def evaluate(self, source: Tensor, coupling: Coupling) -> NetworkGraph:
        """Evaluates f at a source with a graph."""
        with torch.enable_grad(), self.run.calling():
            leaf = source.detach().requires_grad_()
            return NetworkGraph(leaf, self.wanted, self.run.evaluate(leaf, coupling, self.tensors))

    def _pull(self, graph: NetworkGraph, group: Group, cotangents: list[Tensor]) -> Eps:
        """Takes the cotangents back through a group by the graph of its evaluation, and returns the value."""
        run, coupling, eps = self.run, group.coupling, graph.eps
        assert coupling is not None
        if not eps.value.requires_grad:  # f is constant.
            arithmetic.transpose(group, cotangents, None, None)
            return eps
        power = arithmetic.network_power(group, cotangents) if run.half else None
        scale = None if power is None else power.reciprocal()
        cotangent = arithmetic.transpose(group, cotangents, eps, scale)
        inputs = [graph.leaf, *graph.wanted]
        pulled, *others = torch.autograd.grad(eps.value, inputs, cotangent, allow_unused=True)
        for index, gradient in enumerate(others):
            if gradient is not None:
                self.watch.note(gradient, coupling)
                self._add(index, gradient, power)
        if pulled is not None:
            own = cotangents[coupling.source]
            cotangents[coupling.source] = own + pulled if power is None else torch.addcmul(own, pulled, power)
            self.watch.note(cotangents[coupling.source], coupling)
        return eps.detach()

    def _add(self, index: int, gradient: Tensor, power: Tensor | None) -> None:
        """Adds a gradient, times the power of two that the cotangent was divided by, to the sum of its tensor."""
        total = self.sums[index]
        if total is None:
            wide = gradient.to(self.run.state_dtype)
            # Autograd may return one tensor for two inputs, so the sum has memory of its own.
            self.sums[index] = wide * power if power is not None else wide.clone() if wide is gradient else wide
        elif power is None:
            total.add_(gradient)
        else:
            total.addcmul_(gradient.to(total.dtype), power)
