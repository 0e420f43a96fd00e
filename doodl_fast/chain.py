"""The engine: runs a program of couplings forwards and backwards, and takes its vector-Jacobian product.

It knows neither a solver nor diffusion. One coupling `target <- a target + c source + b f(source)` has the VJP
`g_source += c g_target + b J_f(source)^T g_target; g_target <- a g_target`, and its inverse needs f at the same source.
So one
evaluation with a graph serves both: its value undoes the coupling, its graph gives the VJP (for reversible networks at
large: Gomez et al., arXiv 1707.04585; for diffusion latents: DOODL, Wallace et al., arXiv 2303.13703).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import arithmetic
from .arithmetic import Eps, Group
from .evaluator import Evaluator, Raw, raw_method
from .program import Coupling, Program, count_network_calls, invert, step_boundaries

Memory = str | int
STORES = ("checkpoint", "reversible", "naive")
LATENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NO_FLOAT64 = frozenset({"mps"})


class Chain:
    """`x1, y1 = chain(x, y)` runs the program, `x, y = chain.inverse(x1, y1)` undoes it; both are differentiable.

    evaluator: the function f in the couplings (see `Evaluator`).
    program: the couplings, target 0 being x and 1 being y.
    memory: what a forward run keeps for its gradient. "checkpoint": the source of every evaluation, which is all that
        the VJP needs. An int k >= 1: the state every k steps; couplings between are undone. "reversible": the final
        state alone. "naive": plain autograd through everything, the oracle. The gradient is the same up to rounding;
        all but "naive" make one evaluation with a graph per coupling with b != 0 in the backward pass, and no other.
    state_dtype: in which x, y and their cotangents are carried, torch.float32 or torch.float64; never less precise than
        the latents. Default: float64 (float32 on devices without it). Latents are tiny beside a network's activations,
        and undoing EDICT's mixing multiplies rounding errors by 1/p^2 a step.

    Latents are (B, C, ...) tensors of fp16, bf16, fp32 or fp64; results and gradients have their dtype. They are never
    changed or
    kept: in-place changes between forward and backward are harmless.
    Raises ValueError or TypeError, naming the argument.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        program: Sequence[Coupling],
        memory: Memory = "checkpoint",
        *,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if state_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"state_dtype: expected torch.float32, torch.float64 or None, got {state_dtype!r}")
        self.evaluator = evaluator
        self.program: Program = tuple(program)
        self.state_dtype = state_dtype
        self.memory = memory

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
        return self._run(self.program, x, y)

    def inverse(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the inverse program: undoes `__call__` up to rounding. Arguments and results as there."""
        return self._run(invert(self.program), x, y)

    def _run(self, program: Program, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        _check_latents(x, y)
        y = x if y is None else y
        tensors = self.evaluator.tensors()
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, *tensors))
        run = _Run.plan(self, program, x, store=differentiable and self.memory != "naive")
        if run.stores:
            apply: Callable[..., tuple[Tensor, Tensor]] = _ChainFunction.apply  # untyped in torch
            return apply(run, x, y, *tensors)
        with self.evaluator.running(), torch.set_grad_enabled(differentiable):
            if differentiable:
                # autograd keeps the conditions: copies leave the caller free to change his own
                tensors = tuple(t.clone() for t in tensors)
            state = run.enter(x, y)
            run.plain_forward(state, tensors) if differentiable else run.forward(state, tensors)
            return run.leave(state)


@dataclass(frozen=True)
class _Run:
    """Everything that one run and its gradient share. It holds no latents: those go through autograd's own storage."""

    evaluator: Evaluator
    raw: Raw | None
    program: Program
    groups: tuple[Group, ...]
    stores: bool
    anchors: frozenset[int] | None
    """Positions in the program whose state is stored; None: the sources of all evaluations instead."""
    latents_dtype: torch.dtype
    state_dtype: torch.dtype
    autocast: dict[str, Any] | None
    scaled: bool

    @classmethod
    def plan(cls, chain: Chain, program: Program, x: Tensor, store: bool) -> _Run:
        anchors = None
        if chain.memory == "reversible":
            anchors = frozenset({len(program)})
        elif isinstance(chain.memory, int):
            anchors = step_boundaries(program, chain.memory)
        default = torch.float32 if x.device.type in NO_FLOAT64 else torch.float64
        autocast = _autocast_settings(x.device.type)
        half = chain.evaluator.compute_dtype(x.dtype) in (torch.float16, torch.bfloat16)
        return cls(
            evaluator=chain.evaluator,
            raw=raw_method(chain.evaluator),
            program=program,
            groups=arithmetic.group(program, anchors or ()),
            stores=store,
            anchors=anchors,
            latents_dtype=x.dtype,
            state_dtype=torch.promote_types(chain.state_dtype or default, x.dtype),
            autocast=autocast,
            scaled=half or bool(autocast and autocast["enabled"]),
        )

    def enter(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The state as tensors of our own."""
        return [x.to(self.state_dtype, copy=True), y.to(self.state_dtype, copy=True)]

    def leave(self, state: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The state as tensors of the caller's dtype that share no memory with anything kept."""
        return state[0].to(self.latents_dtype, copy=True), state[1].to(self.latents_dtype, copy=True)

    def evaluate(self, source: Tensor, coupling: Coupling, tensors: Sequence[Tensor]) -> Eps:
        """f at a source, as the ops take it."""
        arguments = (source, coupling.tag, tensors, self.latents_dtype)
        eps = Eps(*self.raw(*arguments)) if self.raw is not None else Eps(self.evaluator(*arguments))
        _check_value(eps, source)
        return eps

    def plain_forward(self, state: list[Tensor], tensors: Sequence[Tensor]) -> None:
        """Runs the program on `state` in plain differentiable torch: no ops, no peephole, nothing kept. The oracle."""
        for coupling in self.program:
            value = None
            if coupling.calls_network:
                value = self.evaluator(state[coupling.source], coupling.tag, tensors, self.latents_dtype)
                _check_value(Eps(value), state[coupling.source])
            state[coupling.target] = _plain(coupling, state[coupling.target], state[coupling.source], value)

    def forward(self, state: list[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Runs the program on `state`, in place of its entries; returns what the gradient will need."""
        kept: list[Tensor] = []
        for group in self.groups:
            eps = None
            if group.coupling is not None and group.calls_network:
                source = state[group.coupling.source]
                if self.anchors is None and self.stores:
                    kept.append(source)
                eps = self.evaluate(source, group.coupling, tensors)
            arithmetic.apply(group, state, eps)
            if self.stores and self.anchors is not None and group.end in self.anchors:
                kept += state
        return kept

    def backward(self, kept: list[Tensor], cotangents: list[Tensor], pull: _NetworkPull) -> None:
        """Replaces the cotangents of the run's result by those of its start; consumes `kept`."""
        state: list[Tensor] = []
        for group in reversed(self.groups):
            if self.anchors is not None and group.end in self.anchors:
                state = [kept.pop(-2), kept.pop(-1)]
            if state:
                arithmetic.undo_mixing(group, state)
            eps = None
            if group.coupling is not None and group.calls_network:
                source = state[group.coupling.source] if state else kept.pop()
                eps = pull(source, group, cotangents)
            else:
                arithmetic.transpose(group, cotangents, None, None)
            if state:
                arithmetic.undo_coupling(group, state, eps)


class _NetworkPull:
    """Evaluates f once with a graph: gives its value and pulls a cotangent back through it.

    Gradients of the evaluator's own tensors add up in `sums`, in the state's dtype.
    """

    def __init__(self, run: _Run, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self.run = run
        self.tensors = [t.detach().requires_grad_() if want else t for t, want in zip(tensors, wanted, strict=True)]
        self.wanted = [t for t, want in zip(self.tensors, wanted, strict=True) if want]
        self.sums: list[Tensor | None] = [None] * len(self.wanted)

    def __call__(self, source: Tensor, group: Group, cotangents: list[Tensor]) -> Eps:
        """f at the source of a group's coupling; takes the cotangents back through the whole group."""
        run, coupling = self.run, group.coupling
        assert coupling is not None
        with torch.enable_grad():
            leaf = source.detach().requires_grad_()
            with torch.autocast(**run.autocast) if run.autocast else contextlib.nullcontext():
                eps = run.evaluate(leaf, coupling, self.tensors)
        if not eps.value.requires_grad:  # f is constant
            arithmetic.transpose(group, cotangents, None, None)
            return eps
        power = arithmetic.network_power(group, cotangents) if run.scaled else None
        scale = None if power is None else power.reciprocal()
        cotangent = arithmetic.transpose(group, cotangents, eps, scale)
        pulled, *others = torch.autograd.grad(eps.value, [leaf, *self.wanted], cotangent, allow_unused=True)
        for index, gradient in enumerate(others):
            if gradient is not None:
                gradient = _unscale(gradient.to(run.state_dtype), power)
                total = self.sums[index]
                self.sums[index] = gradient if total is None else total + gradient
        if pulled is not None:
            cotangents[coupling.source] = cotangents[coupling.source] + _unscale(pulled, power)
        return eps.detach()


class _ChainFunction(torch.autograd.Function):
    """A run as one node of the caller's graph."""

    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        state = run.enter(x, y)
        with run.evaluator.running():
            kept = run.forward(state, tensors)
        ctx.run, ctx.num_kept = run, len(kept)
        # Clones: the caller may change his conditions before the backward pass.
        ctx.save_for_backward(*kept, *(t.clone() for t in tensors))
        return run.leave(state)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        kept, tensors = list(ctx.saved_tensors[: ctx.num_kept]), ctx.saved_tensors[ctx.num_kept :]
        _, needs_x, needs_y, *wanted = ctx.needs_input_grad
        with torch.no_grad(), run.evaluator.running():
            pull = _NetworkPull(run, tensors, wanted)
            cotangents = [gradient.to(run.state_dtype) for gradient in grad_outputs]
            run.backward(kept, cotangents, pull)
            sums = iter(pull.sums)
            grads: list[Tensor | None] = [
                cotangent.to(run.latents_dtype) if needed else None
                for cotangent, needed in zip(cotangents, (needs_x, needs_y), strict=True)
            ]
            for tensor, want in zip(tensors, wanted, strict=True):
                total = next(sums) if want else None
                grads.append(None if total is None else total.to(tensor.dtype))
        if torch.is_grad_enabled():  # create_graph=True
            guard: Callable[[Tensor], Tensor] = _FirstOrderOnly.apply
            grads = [None if gradient is None else guard(gradient.requires_grad_()) for gradient in grads]
        return None, *grads


class _FirstOrderOnly(torch.autograd.Function):
    """Passes a gradient on; differentiating it again is an error rather than silently zero."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise RuntimeError(
            "the chain's gradient cannot be differentiated again: its backward pass frees each network graph at once; "
            'use memory="naive" for second derivatives'
        )


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
