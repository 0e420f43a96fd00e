"""A run of a chain as one node of the caller's autograd graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.backends import registry
from .host_reads import at_once
from .run import Graphs, Kept, ProgramRun
from .transforms import refuse_transforms
from .weights import Snapshot


def run_as_node(run: ProgramRun, latents: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Runs a program so that the result is connected to the latents and the evaluator's tensors in the caller's graph.

    Args:
        run: The run.
        latents: What the program works on, (B, C, ...) each.
        tensors: The evaluator's own tensors.
    """
    connect: Callable[..., Tensor] = _Connection.apply  # This is untyped in torch.
    apply: Callable[..., tuple[Tensor, ...]] = ChainFunction.apply
    return apply(run, connect(*latents, *tensors), *latents, *tensors)


class ChainFunction(torch.autograd.Function):
    """The node: runs the program forwards, and takes cotangents through it backwards."""

    @staticmethod
    def forward(ctx: Any, run: ProgramRun, connection: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        latents, tensors = inputs[: run.num_latents], inputs[run.num_latents :]
        work = run.new_arithmetic()
        state = work.enter(*latents)
        # The caller may change the latents and conditions before the backward pass, so they are copied. Weights are
        # not: `Snapshot` refuses a backward pass whose weights have changed.
        weights = {id(weight) for _, weight in run.evaluator.weights()}
        start = () if run.anchors is None else tuple(latent.clone() for latent in latents)
        tensors = tuple(t if id(t) in weights else t.clone() for t in tensors)
        graphs: Graphs = {}
        with run.running():
            kept = run.forward(work, state, tensors, ctx.needs_input_grad[2 + run.num_latents :], graphs)
        work.finish()
        ctx.run, ctx.num_kept, ctx.num_start, ctx.graphs = run, len(kept.tensors), len(start), graphs
        ctx.fingerprints, ctx.weights, ctx.backend = kept.fingerprints, Snapshot.take(run.evaluator), registry.choice()
        ctx.connection = connection
        ctx.save_for_backward(*kept.tensors, *start, *tensors)
        return work.leave(state)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms("the cotangents of a chain's result", *grad_outputs)
        ctx.weights.check(ctx.run.evaluator)
        while True:
            try:
                with _backend(ctx.backend), at_once():
                    return None, None, *_input_gradients(ctx, grad_outputs)
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # The traceback holds the tensors that the pass had made.
            ctx.graphs.clear()
            run: ProgramRun | None = ctx.run.fallback(ctx.run)
            if run is None:
                raise failure
            ctx.run = run


def _backend(name: str) -> contextlib.AbstractContextManager[None]:
    """The backend of the forward run. Autograd may call a backward pass in a thread of its own, where the caller's
    choice is unknown."""
    return contextlib.nullcontext() if registry.choice() == name else registry.backend(name)


def _input_gradients(ctx: Any, grad_outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the latents, then those of the evaluator's tensors; None for those that need none."""
    run: ProgramRun = ctx.run
    saved, middle = list(ctx.saved_tensors), ctx.num_kept + ctx.num_start
    kept, start, tensors = Kept(saved[: ctx.num_kept], ctx.fingerprints), saved[ctx.num_kept : middle], saved[middle:]
    del saved  # The pass frees each tensor once it has used it.
    needs = ctx.needs_input_grad[2:]
    needed, wanted = needs[: run.num_latents], needs[run.num_latents :]
    with torch.no_grad(), run.evaluator.running():
        cotangents, totals = run.gradient(kept, start, tensors, wanted, grad_outputs, ctx.graphs)
        sums = iter(totals)
        grads: list[Tensor | None] = [
            cotangent.to(run.latents_dtype) if need else None
            for cotangent, need in zip(cotangents, needed, strict=True)
        ]
        for tensor, want in zip(tensors, wanted, strict=True):
            total = next(sums) if want else None
            grads.append(None if total is None else total.to(tensor.dtype))
    if torch.is_grad_enabled():  # The caller passed create_graph=True.
        guard: Callable[..., Tensor] = _FirstOrderOnly.apply
        grads = [None if gradient is None else guard(gradient, ctx.connection, *grad_outputs) for gradient in grads]
    return grads


class _Connection(torch.autograd.Function):
    """An empty tensor that is connected to its arguments in the caller's graph, and keeps none of them.

    A chain saves it in place of its arguments, which the caller may change. Through it the gradient of a backward pass
    with create_graph=True depends on them, so that differentiating it again reaches `_FirstOrderOnly`.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.count = len(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count


class _FirstOrderOnly(torch.autograd.Function):
    """Passes a gradient on, as a function of all that it depends on; differentiating it again is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise RuntimeError(
            "the chain's gradient cannot be differentiated again: its backward pass frees each network graph at once; "
            'use memory="naive" for second derivatives'
        )
