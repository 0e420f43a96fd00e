"""One run of a program, forwards, and its vector-Jacobian product (VJP), backwards.

One coupling `target <- a target + c source + b f(source)` has the VJP
`g_source += c g_target + b J_f(source)^T g_target; g_target <- a g_target`, and its inverse needs f at the same source.
So one evaluation with a graph serves both: its value undoes the coupling, its graph gives the VJP (for reversible
networks at large: Gomez et al., arXiv 1707.04585; for diffusion latents: DOODL, Wallace et al., arXiv 2303.13703).

An `Arithmetic` says how x and y are held, and how a coupling is done and undone on them. Cotangents are always floating
point. `walk.py` has the loops over the program, `pull.py` the evaluations with a graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import arithmetic
from .arithmetic import Arithmetic, Eps, Group
from .checks import Trust, Watch, cotangent_rounding, distance, explain_first_evaluation
from .evaluator import Evaluator, raw_output
from .program import Coupling, Program, num_values, step_boundaries
from .pull import Graphs, NetworkPull
from .repeatability import Fingerprints, tolerance
from .scaling import scaled_call
from .transforms import refuse_transforms
from .walk import walk_backwards, walk_forwards, walk_plainly


@dataclass
class Kept:
    """What a forward run keeps for its gradient.

    Attributes:
        tensors: The sources of all evaluations, or the stored states one after another.
        fingerprints: By the end of its group, the numbers of each output that the backward pass compares with its own.
    """

    tensors: list[Tensor] = field(default_factory=list)
    fingerprints: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgramRun:
    """Everything that one run and its gradient share. It holds no latents: those go through autograd's own storage.

    Attributes:
        evaluator: The function f in the couplings.
        program: The couplings.
        groups: The same, in the passes that the fused operators do.
        stores: Whether the forward run keeps what a gradient needs.
        anchors: Positions in the program whose states are stored. None: the sources of all evaluations are.
        latents_dtype: The dtype of the caller's latents.
        state_dtype: The dtype of the cotangents, of what the evaluator is given, and of a floating-point state.
        new_arithmetic: Makes the arithmetic of one pass over the program.
        autocast: The caller's autocast, which the backward pass enters again.
        network_dtype: The dtype that the network computes in.
        trust: What the chain remembers of its runs' checks.
        graph_makers: By the ends of the groups whose network graph the forward run keeps, so that the gradient does
            not evaluate them again: the evaluator that makes the graph, which is `evaluator` in another way.
        fallback: Asked when a backward pass is out of memory. Returns the run to go on with, which has the same states
            and no graphs, or None.
    """

    evaluator: Evaluator
    program: Program
    groups: tuple[Group, ...]
    stores: bool
    anchors: frozenset[int] | None
    latents_dtype: torch.dtype
    state_dtype: torch.dtype
    new_arithmetic: Callable[[], Arithmetic]
    autocast: dict[str, Any] | None
    network_dtype: torch.dtype
    trust: Trust
    graph_makers: Mapping[int, Evaluator] = field(default_factory=dict)
    fallback: Callable[[ProgramRun], ProgramRun | None] = lambda run: None

    @classmethod
    def create(
        cls,
        evaluator: Evaluator,
        program: Program,
        states: str | int,
        x: Tensor,
        state_dtype: torch.dtype,
        new_arithmetic: Callable[[], Arithmetic],
        store: bool,
        trust: Trust,
        graphs: Sequence[tuple[Evaluator, int]] = (),
    ) -> ProgramRun:
        """Makes a run.

        Args:
            evaluator: The function f in the couplings.
            program: The couplings.
            states: What is stored: "checkpoint" for the source of every evaluation, "reversible" for the final state,
                an int k for the state every k steps.
            x: The latents, or a tensor of their device and dtype.
            state_dtype: See the attribute.
            new_arithmetic: See the attribute.
            store: Whether a gradient will be asked for.
            trust: See the attribute.
            graphs: The evaluators that make the graphs of the last evaluations, which are kept, in the program's order,
                and how many graphs each makes. None are kept where VJPs are taken of another evaluator.
        """
        anchors = None
        if states == "reversible":
            anchors = frozenset({len(program)})
        elif isinstance(states, int):
            anchors = step_boundaries(program, states)
        autocast = _autocast_settings(x.device.type)
        network_dtype = evaluator.compute_dtype(x.dtype)
        if autocast and autocast["enabled"]:
            network_dtype = autocast["dtype"]
        groups = arithmetic.group(program, anchors or ())
        calling = [group.end for group in groups if group.calls_network]
        makers = [maker for maker, count in graphs for _ in range(count)][::-1]
        if not store or evaluator.for_vjp() is not None:
            makers = []
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
            graph_makers=dict(zip(reversed(calling), makers, strict=False)),
        )

    @property
    def num_latents(self) -> int:
        """How many latents the program works on: two, unless the sampler remembers earlier steps or adds noise."""
        return num_values(self.program)

    @property
    def half(self) -> bool:
        """Whether the network computes in fp16 or bf16, so that its cotangents must be scaled."""
        return self.network_dtype in (torch.float16, torch.bfloat16)

    def for_vjp(self) -> ProgramRun:
        """This run with the evaluator that VJPs are taken of, which most often is the same."""
        other = self.evaluator.for_vjp()
        if other is None:
            return self
        autocast = self.autocast and {**self.autocast, "enabled": False}
        dtype = other.compute_dtype(self.latents_dtype)
        return replace(self, evaluator=other, network_dtype=dtype, autocast=autocast)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The context of the forward run, for all evaluators that it calls."""
        with contextlib.ExitStack() as stack:
            for evaluator in {id(e): e for e in (self.evaluator, *self.graph_makers.values())}.values():
                stack.enter_context(evaluator.running())
            yield

    def calling(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which a backward pass calls the network: the autocast of the forward run."""
        return torch.autocast(**self.autocast) if self.autocast else contextlib.nullcontext()

    def evaluate(self, source: Tensor, coupling: Coupling, tensors: Sequence[Tensor]) -> Eps:
        """f at a source, as the fused operators take it."""
        eps = Eps(*raw_output(self.evaluator, source, coupling.tag, tensors, self.latents_dtype))
        _check_shape(eps, source)
        refuse_transforms("the network's output", eps.value)
        return eps

    def plain_forward(self, state: list[Tensor], tensors: Sequence[Tensor]) -> None:
        """Runs the program on `state` in plain differentiable torch, and keeps nothing of its own: the oracle."""
        watch = Watch(self.program, "forward", self.network_dtype)

        def evaluate(coupling: Coupling, source: Tensor) -> Tensor:
            def network(x: Tensor, others: Sequence[Tensor]) -> Tensor:
                return self.evaluator(x, coupling.tag, others, self.latents_dtype)

            with explain_first_evaluation(self.evaluator, source, watch.started):
                value = scaled_call(network, source, tensors) if self.half else network(source, tensors)
            _check_shape(Eps(value), source)
            return value

        for coupling in walk_plainly(self.program, state, evaluate):
            if coupling.calls_network:
                watch.note(state[coupling.target], coupling)
        watch.check_later()

    def forward(
        self,
        work: Arithmetic,
        state: list[Tensor],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool] = (),
        graphs: Graphs | None = None,
    ) -> Kept:
        """Runs the program on `state`, whose entries are replaced.

        Args:
            work: The arithmetic that the state is held in.
            state: The state at the start.
            tensors: What the evaluator is given in place of its own tensors.
            wanted: Which of the tensors want gradients.
            graphs: Is given the network graphs to keep.
        """
        kept = Kept()
        watch = Watch(self.program, "forward", self.network_dtype)
        fingerprints = Fingerprints(self.state_dtype)
        makers = {id(maker): maker for maker in self.graph_makers.values()} if graphs is not None else {}
        pulls = {key: NetworkPull(replace(self, evaluator=maker), tensors, wanted) for key, maker in makers.items()}

        def evaluate(group: Group, source: Tensor) -> Eps:
            assert group.coupling is not None
            if self.anchors is None and self.stores:
                kept.tensors.append(source)
            with explain_first_evaluation(self.evaluator, source, watch.started):
                if graphs is not None and group.end in self.graph_makers:
                    pull = pulls[id(self.graph_makers[group.end])]
                    graph = graphs[group.end] = pull.evaluate(source, group.coupling)
                    return graph.eps.detach()
                eps = self.evaluate(source, group.coupling, tensors)
            if self.anchors is None and self.stores:
                kept.fingerprints[group.end] = fingerprints.of(eps.value)
            return eps

        for group, eps in walk_forwards(self.groups, work, state, evaluate):
            if eps is not None:
                watch.note(state[group.target], group.coupling)
            if self.stores and self.anchors is not None and group.end in self.anchors:
                kept.tensors += state
        watch.check_later()
        return kept

    def gradient(
        self,
        kept: Kept,
        start: Sequence[Tensor],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
        cotangents: Sequence[Tensor],
        graphs: Graphs,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The cotangents of the run's start and of the wanted tensors. Consumes `kept` and `graphs`.

        If undoing the couplings does not lead back to the start, the gradient is that of a second run, from
        checkpoints.

        Args:
            kept: What the forward run returned.
            start: The latents that the run began with, where couplings are undone; else empty.
            tensors: The evaluator's tensors, as the forward run had them.
            wanted: Which of them want gradients.
            cotangents: Those of the run's result, one for each latent.
            graphs: The network graphs that the forward run kept.
        """
        pull = NetworkPull(self, tensors, wanted)
        pulled = [cotangent.to(self.state_dtype) for cotangent in cotangents]
        for cotangent in pulled:
            pull.watch.note(cotangent, None)
        work = self.new_arithmetic()
        fingerprints = Fingerprints(self.state_dtype)
        drifts = self.backward(work, kept, start, pulled, pull, graphs, fingerprints)
        found: dict[str, Tensor] = {}
        if drifts:
            found["drift"] = torch.stack(drifts).amax()
        mismatch = fingerprints.mismatch()
        if mismatch is not None:
            found["mismatch"] = mismatch
        if self.latents_dtype == torch.float16:
            found["rounding"] = cotangent_rounding(cotangents)
        # Everything is read on the host at once, so a pass synchronises once.
        numbers = dict(zip(found, pull.watch.read(*found.values()), strict=True))
        half = self.half or self.state_dtype == torch.float32
        if "drift" in numbers and not self.trust.within_tolerance(numbers["drift"], work.exact, half):
            again = replace(self, anchors=None, groups=arithmetic.group(self.program), graph_makers={})
            work = again.new_arithmetic()
            with again.calling():
                kept = again.forward(work, work.enter(*start), tensors)
            work.finish()
            return again.gradient(kept, (), tensors, wanted, cotangents, {})
        work.finish()
        pull.watch.check()
        if "mismatch" in numbers:
            self.trust.note_mismatch(numbers["mismatch"], tolerance(self.network_dtype, pull.run is not self))
        if "rounding" in numbers:
            self.trust.note_rounding(numbers["rounding"])
        return pulled, pull.sums

    def backward(
        self,
        work: Arithmetic,
        kept: Kept,
        start: Sequence[Tensor],
        cotangents: list[Tensor],
        pull: NetworkPull,
        graphs: Graphs,
        fingerprints: Fingerprints,
    ) -> list[Tensor]:
        """Replaces the cotangents of the run's result by those of its start. Consumes `kept` and `graphs`.

        Args:
            fingerprints: Is given each output of this pass to compare with that of the forward run.

        Returns:
            How far the undone states are from the stored ones, the last of which is the start.
        """
        width = len(cotangents) * work.tensors_per_value
        undoes = self.anchors is not None and bool(self.groups)
        state = take_last(kept.tensors, width) if undoes else []

        def visit(group: Group, source: Tensor | None) -> Eps | None:
            if not group.calls_network:
                arithmetic.transpose(group, cotangents, None, None)
                return None
            source = kept.tensors.pop() if source is None else source
            eps = pull(source, group, cotangents, undoes, graphs.pop(group.end, None))
            if group.end in kept.fingerprints and pull.latest is not None:
                fingerprints.compare(kept.fingerprints[group.end], pull.latest)
            return eps

        drifts: list[Tensor] = []
        for position in walk_backwards(self.groups, work, state, visit):
            if undoes and self.anchors is not None and position in self.anchors:
                stored = take_last(kept.tensors, width)
                drifts.append(distance(state, stored))
                state[:] = stored
        if undoes:
            drifts.append(distance(state, work.enter(*start)))
        return drifts


def take_last(tensors: list[Tensor], count: int) -> list[Tensor]:
    """Removes the last `count` tensors from a list and returns them."""
    taken = tensors[-count:]
    del tensors[-count:]
    return taken


def _check_shape(eps: Eps, source: Tensor) -> None:
    """Raises ValueError if a network's output does not have the shape that its input asks for."""
    batch = source.shape[0] * (1 if eps.g is None else 2)
    if eps.value.shape != (batch, *source.shape[1:]):
        raise ValueError(
            f"evaluator: expected a value of shape {(batch, *source.shape[1:])}, got {tuple(eps.value.shape)}"
        )


def _autocast_settings(device_type: str) -> dict[str, Any] | None:
    """The autocast that the caller is in, as arguments of `torch.autocast`; None on devices that have none."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
