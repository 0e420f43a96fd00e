"""One run of a program, forwards, and its vector-Jacobian product, backwards.

One coupling `target <- a target + c source + b f(source)` has the VJP
`g_source += c g_target + b J_f(source)^T g_target; g_target <- a g_target`, and its inverse needs f at the same source.
So one evaluation with a graph serves both: its value undoes the coupling, its graph gives the VJP (for reversible
networks at large: Gomez et al., arXiv 1707.04585; for diffusion latents: DOODL, Wallace et al., arXiv 2303.13703).

How x and y are held, and how a coupling is done and undone on them, is an `Arithmetic`'s business; cotangents are
always floating point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arithmetic
from .arithmetic import Arithmetic, Eps, Group
from .checks import Trust, Watch, distance
from .evaluator import Evaluator, raw_output
from .program import Coupling, Program, num_values, step_boundaries

Memory = str | int


class NetworkGraph(NamedTuple):
    """One evaluation of f with its graph: from `leaf`, and from `wanted` of the evaluator's own tensors, to `eps`."""

    leaf: Tensor
    wanted: list[Tensor]
    eps: Eps


Graphs = dict[int, NetworkGraph]
"""By the end of the group that the evaluation belongs to."""


@dataclass(frozen=True)
class Run:
    """Everything that one run and its gradient share. It holds no latents: those go through autograd's own storage."""

    evaluator: Evaluator
    program: Program
    groups: tuple[Group, ...]
    stores: bool
    anchors: frozenset[int] | None
    """Positions in the program whose state is stored; None: the sources of all evaluations instead."""
    latents_dtype: torch.dtype
    state_dtype: torch.dtype
    """Of the cotangents, of what the evaluator is given, and of a floating-point state."""
    new_arithmetic: Callable[[], Arithmetic]
    """Makes the arithmetic of one pass over the program."""
    autocast: dict[str, Any] | None
    network_dtype: torch.dtype
    trust: Trust
    graph_ends: frozenset[int] = frozenset()
    """Ends of the groups whose whole network graph a forward run keeps, so that its gradient evaluates them no more."""
    fallback: Callable[[Run], Run | None] = lambda run: None
    """Asked when a backward pass is out of memory: the run to go on with, of the same states but without graphs."""

    @classmethod
    def create(
        cls,
        evaluator: Evaluator,
        program: Program,
        memory: Memory,
        x: Tensor,
        state_dtype: torch.dtype,
        new_arithmetic: Callable[[], Arithmetic],
        store: bool,
        trust: Trust,
        graphs: int = 0,
    ) -> Run:
        """x: the latents, or a tensor of their device and dtype. store: whether a gradient will be asked for.

        graphs: of how many of the last evaluations the whole graph is kept; none where VJPs are another evaluator's.
        """
        anchors = None
        if memory == "reversible":
            anchors = frozenset({len(program)})
        elif isinstance(memory, int):
            anchors = step_boundaries(program, memory)
        autocast = _autocast_settings(x.device.type)
        network_dtype = evaluator.compute_dtype(x.dtype)
        if autocast and autocast["enabled"]:
            network_dtype = autocast["dtype"]
        groups = arithmetic.group(program, anchors or ())
        calling = [group.end for group in groups if group.calls_network]
        if not store or evaluator.for_vjp() is not None:
            graphs = 0
        return cls(
            evaluator=evaluator,
            program=program,
            groups=groups,
            stores=store,
            anchors=anchors,
            latents_dtype=x.dtype,
            state_dtype=state_dtype,
            new_arithmetic=new_arithmetic,
            autocast=autocast,
            network_dtype=network_dtype,
            trust=trust,
            graph_ends=frozenset(calling[max(0, len(calling) - graphs) :]),
        )

    @property
    def num_latents(self) -> int:
        """How many latents the program works on: two, unless the sampler remembers earlier steps or adds noise."""
        return num_values(self.program)

    @property
    def half(self) -> bool:
        """Whether the network computes in fp16 or bf16, so that its cotangents must be scaled."""
        return self.network_dtype in (torch.float16, torch.bfloat16)

    def for_vjp(self) -> Run:
        """This run with what the evaluator has its VJPs taken of, most often itself."""
        other = self.evaluator.for_vjp()
        if other is None:
            return self
        autocast = self.autocast and {**self.autocast, "enabled": False}
        dtype = other.compute_dtype(self.latents_dtype)
        return replace(self, evaluator=other, network_dtype=dtype, autocast=autocast)

    def calling(self) -> contextlib.AbstractContextManager[Any]:
        """What a backward pass calls the network under: the autocast of the forward run."""
        return torch.autocast(**self.autocast) if self.autocast else contextlib.nullcontext()

    def evaluate(self, source: Tensor, coupling: Coupling, tensors: Sequence[Tensor]) -> Eps:
        """f at a source, as the ops take it."""
        eps = Eps(*raw_output(self.evaluator, source, coupling.tag, tensors, self.latents_dtype))
        _check_value(eps, source)
        return eps

    def plain_forward(self, state: list[Tensor], tensors: Sequence[Tensor]) -> None:
        """Runs the program on `state` in plain differentiable torch: no ops, no peephole, nothing kept. The oracle."""
        watch = Watch(self.program, "forward", self.network_dtype)
        for coupling in self.program:
            value = None
            if coupling.calls_network:
                value = self.evaluator(state[coupling.source], coupling.tag, tensors, self.latents_dtype)
                _check_value(Eps(value), state[coupling.source])
            state[coupling.target] = _plain(coupling, state[coupling.target], state[coupling.source], value)
            if value is not None:
                watch.note(state[coupling.target], coupling)
        watch.read()
        watch.check()

    def forward(
        self,
        work: Arithmetic,
        state: list[Tensor],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool] = (),
        graphs: Graphs | None = None,
    ) -> list[Tensor]:
        """Runs the program on `state`, in place of its entries; returns what the gradient will need.

        graphs: is given the network graphs to keep, with respect to the wanted tensors as well.
        """
        kept: list[Tensor] = []
        watch = Watch(self.program, "forward", self.network_dtype)
        for group in self.groups:
            eps = None
            if group.coupling is not None and group.calls_network:
                source = work.source(state, group.coupling)
                if self.anchors is None and self.stores:
                    kept.append(source)
                if graphs is not None and group.end in self.graph_ends:
                    graph = graphs[group.end] = NetworkPull(self, tensors, wanted).evaluate(source, group.coupling)
                    eps = graph.eps.detach()
                else:
                    eps = self.evaluate(source, group.coupling, tensors)
            work.apply(group, state, eps)
            if eps is not None:
                watch.note(state[group.target], group.coupling)
            if self.stores and self.anchors is not None and group.end in self.anchors:
                kept += state
        watch.read()
        watch.check()
        return kept

    def gradient(
        self,
        kept: list[Tensor],
        start: Sequence[Tensor],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
        cotangents: Sequence[Tensor],
        graphs: Graphs,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Cotangents of the run's start and of the wanted tensors; consumes `kept` and `graphs`.

        start: the latents that the run began with, where couplings are undone. If undoing them does not lead back to
        it, the gradient is that of a second run, from checkpoints.
        """
        pull = NetworkPull(self, tensors, wanted)
        pulled = [cotangent.to(self.state_dtype) for cotangent in cotangents]
        for cotangent in pulled:
            pull.watch.note(cotangent, None)
        work = self.new_arithmetic()
        drifts = self.backward(work, kept, start, pulled, pull, graphs)
        drift = pull.watch.read(*([torch.stack(drifts).amax()] if drifts else []))
        if drift and not self.trust.bears(drift[0], work.exact, self.half or self.state_dtype == torch.float32):
            again = replace(self, anchors=None, groups=arithmetic.group(self.program), graph_ends=frozenset())
            work = again.new_arithmetic()
            with again.calling():
                kept = again.forward(work, work.enter(*start), tensors)
            work.finish()
            return again.gradient(kept, (), tensors, wanted, cotangents, {})
        work.finish()
        pull.watch.check()
        return pulled, pull.sums

    def backward(
        self,
        work: Arithmetic,
        kept: list[Tensor],
        start: Sequence[Tensor],
        cotangents: list[Tensor],
        pull: NetworkPull,
        graphs: Graphs,
    ) -> list[Tensor]:
        """Replaces the cotangents of the run's result by those of its start; consumes `kept` and `graphs`.

        Returns how far the undone states are from the stored ones, of which the start is the last.
        """
        state: list[Tensor] = []
        drifts: list[Tensor] = []
        for group in reversed(self.groups):
            if self.anchors is not None and group.end in self.anchors:
                width = len(cotangents) * work.tensors_per_value
                stored = kept[-width:]
                del kept[-width:]
                if state:
                    drifts.append(distance(state, stored))
                state = stored
            if state:
                work.undo_mixing(group, state)
            eps = None
            if group.coupling is not None and group.calls_network:
                source = work.source(state, group.coupling) if state else kept.pop()
                eps = pull(source, group, cotangents, bool(state), graphs.pop(group.end, None))
            else:
                arithmetic.transpose(group, cotangents, None, None)
            if state:
                work.undo_coupling(group, state, eps)
        if state:
            drifts.append(distance(state, work.enter(*start)))
        return drifts


class NetworkPull:
    """Evaluates f once with a graph: gives its value and pulls a cotangent back through it.

    An evaluator whose VJPs are taken of another one is evaluated a second time where its value is wanted.

    Gradients of the evaluator's own tensors add up in `sums`, in the state's dtype.
    """

    def __init__(self, run: Run, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self.value, self.run = run, run.for_vjp()
        self.watch = Watch(run.program, "VJP", self.run.network_dtype)
        self.tensors = [t.detach().requires_grad_() if want else t for t, want in zip(tensors, wanted, strict=True)]
        self.wanted = [t for t, want in zip(self.tensors, wanted, strict=True) if want]
        self.sums: list[Tensor | None] = [None] * len(self.wanted)

    def __call__(
        self, source: Tensor, group: Group, cotangents: list[Tensor], undoing: bool, graph: NetworkGraph | None = None
    ) -> Eps | None:
        """Takes the cotangents back through a whole group; f at the source of its coupling if that is to be undone.

        graph: of an evaluation at that source, which is not repeated then.
        """
        assert group.coupling is not None
        if self.value is self.run:
            return self._pull(graph or self.evaluate(source, group.coupling), group, cotangents)
        # up to the end of the VJP: a network that checkpoints its blocks calls them again in it
        with self.run.evaluator.running():
            self._pull(self.evaluate(source, group.coupling), group, cotangents)
        if not undoing:
            return None
        with self.value.calling():
            return self.value.evaluate(source, group.coupling, self.tensors).detach()

    def evaluate(self, source: Tensor, coupling: Coupling) -> NetworkGraph:
        with torch.enable_grad(), self.run.calling():
            leaf = source.detach().requires_grad_()
            return NetworkGraph(leaf, self.wanted, self.run.evaluate(leaf, coupling, self.tensors))

    def _pull(self, graph: NetworkGraph, group: Group, cotangents: list[Tensor]) -> Eps:
        run, coupling, eps = self.run, group.coupling, graph.eps
        assert coupling is not None
        if not eps.value.requires_grad:  # f is constant
            arithmetic.transpose(group, cotangents, None, None)
            return eps
        power = arithmetic.network_power(group, cotangents) if run.half else None
        scale = None if power is None else power.reciprocal()
        cotangent = arithmetic.transpose(group, cotangents, eps, scale)
        inputs = [graph.leaf, *graph.wanted]
        pulled, *others = torch.autograd.grad(eps.value, inputs, cotangent, allow_unused=True)
        for index, gradient in enumerate(others):
            if gradient is not None:
                gradient = _unscale(gradient.to(run.state_dtype), power)
                total = self.sums[index]
                self.watch.note(gradient, coupling)
                self.sums[index] = gradient if total is None else total + gradient
        if pulled is not None:
            cotangents[coupling.source] = cotangents[coupling.source] + _unscale(pulled, power)
            self.watch.note(cotangents[coupling.source], coupling)
        return eps.detach()


def _check_value(eps: Eps, source: Tensor) -> None:
    batch = source.shape[0] * (1 if eps.g is None else 2)
    if eps.value.shape != (batch, *source.shape[1:]):
        raise ValueError(
            f"evaluator: expected a value of shape {(batch, *source.shape[1:])}, got {tuple(eps.value.shape)}"
        )


def _plain(coupling: Coupling, target: Tensor, source: Tensor, value: Tensor | None) -> Tensor:
    """`a target + c source + b value` in the state's dtype. In the order of `ops.coupling`, and each operation on its
    own (torch.add with alpha would contract two roundings into one on some devices): all modes give the same bits."""
    if coupling.a != 1:
        target = target * coupling.a
    if coupling.c:
        target = target + source * coupling.c
    if value is not None:
        target = target + value * coupling.b
    return target


def _unscale(gradient: Tensor, power: Tensor | None) -> Tensor:
    return gradient if power is None else gradient * power


def _autocast_settings(device_type: str) -> dict[str, Any] | None:
    """The caller's autocast, to be entered again when the backward pass evaluates."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
