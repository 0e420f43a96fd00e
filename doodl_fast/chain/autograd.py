"""A run of the engine as one node of the caller's autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .run import Graphs, Run


class ChainFunction(torch.autograd.Function):
    """A run as one node of the caller's graph."""

    @staticmethod
    def forward(ctx: Any, run: Run, *inputs: Tensor) -> tuple[Tensor, ...]:
        latents, tensors = inputs[: run.num_latents], inputs[run.num_latents :]
        work = run.new_arithmetic()
        state = work.enter(*latents)
        # The caller may change the latents and conditions before the backward pass, so it gets copies of them.
        start = () if run.anchors is None else tuple(latent.clone() for latent in latents)
        tensors = tuple(t.clone() for t in tensors)
        graphs: Graphs = {}
        with run.evaluator.running():
            kept = run.forward(work, state, tensors, ctx.needs_input_grad[1 + run.num_latents :], graphs)
        work.finish()
        ctx.run, ctx.num_kept, ctx.num_start, ctx.graphs = run, len(kept), len(start), graphs
        ctx.save_for_backward(*kept, *start, *tensors)
        return work.leave(state)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        while True:
            try:
                return None, *_input_gradients(ctx, grad_outputs)
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # which holds what the pass had made
            ctx.graphs.clear()
            run: Run | None = ctx.run.fallback(ctx.run)
            if run is None:
                raise failure
            ctx.run = run


def _input_gradients(ctx: Any, grad_outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the latents, then those of the evaluator's tensors; None for those that need none."""
    run: Run = ctx.run
    saved, middle = list(ctx.saved_tensors), ctx.num_kept + ctx.num_start
    kept, start, tensors = saved[: ctx.num_kept], saved[ctx.num_kept : middle], saved[middle:]
    del saved  # what is consumed is freed
    needed, wanted = ctx.needs_input_grad[1 : 1 + run.num_latents], ctx.needs_input_grad[1 + run.num_latents :]
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
    if torch.is_grad_enabled():  # create_graph=True
        guard: Callable[[Tensor], Tensor] = _FirstOrderOnly.apply
        grads = [None if gradient is None else guard(gradient.requires_grad_()) for gradient in grads]
    return grads


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
