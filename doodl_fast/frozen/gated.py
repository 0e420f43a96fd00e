"""Gated activations (GEGLU, SwiGLU) that keep the projection alone, as one op where that is as exact as PyTorch's.

PyTorch reads and writes tensors once for the activation and once for the product. The op `ops.gated_activation` does
both in one pass, and its gradient writes both halves in another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..ops.transforms import is_plain
from .functions import entered
from .recipes import load, recipe_of, save

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_aten = torch.ops.aten


class Gate(NamedTuple):
    """An activation: its name in `ops.gated_activation`, the function, and what writes the gradient of its argument."""

    name: str
    function: Callable[[Tensor], Tensor]
    backward: Callable[..., Any]


GELU = Gate("gelu", F.gelu, _aten.gelu_backward.grad_input)
SILU = Gate("silu", F.silu, _aten.silu_backward.grad_input)


def may_be_one_op(x: Tensor) -> bool:
    """Whether the op may be called in the place of a layer with the input x: nothing traces, casts or transforms it."""
    return type(x) is Tensor and is_plain() and not torch._C._is_any_autocast_enabled()


def gated(x: Tensor, gate: Gate, one_op: bool) -> Tensor:
    """Multiplies the first half of the last dimension by an activation of the second, and keeps x alone.

    Args:
        x: A tensor whose last dimension is even.
        gate: The activation.
        one_op: Whether the op may be called. It then is where it pays, with and without a graph.
    """
    one_op = one_op and _pays(x)
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Gated.apply(x, recipe_of(x) or x, gate, one_op)  # type: ignore[no-untyped-call]
        return result
    return ops.gated_activation(x, gate.name) if one_op else _product(x, gate)


def _pays(x: Tensor) -> bool:
    """Whether the op is faster than PyTorch's layers, and as exact.

    On a CPU it must have the bits of PyTorch, which it has for several rows. On a GPU it rounds where PyTorch does, and
    its exponential and error functions may differ in the last place. This depends on x's device, dtype, layout and size
    alone, and not on whether a graph is made or the call is recorded as a CUDA graph. So all calls of a run with equal
    inputs give the same bits.
    """
    if not _fits(x):
        return False
    if x.is_cpu:
        return ops.matches_torch("gated_activation")
    return x.is_cuda and ops.has_kernel("gated_activation", x)


def _fits(x: Tensor) -> bool:
    """Whether the op takes a tensor as it is, on whatever device it is."""
    return type(x) is Tensor and x.dtype in _DTYPES and x.is_contiguous() and x.numel() > x.shape[-1]


def _product(x: Tensor, gate: Gate) -> Tensor:
    hidden, argument = x.chunk(2, dim=-1)
    return hidden * gate.function(argument)


class _Gated(torch.autograd.Function):
    """A gated activation, which keeps the tensor whose halves it multiplies, or what that follows from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Any, gate: Gate, one_op: bool) -> Tensor:
        save(ctx, kept)
        ctx.gate, ctx.backend = gate, ops.choice() if one_op else None
        return ops.gated_activation(x, gate.name) if one_op else _product(x, gate)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,), gate = load(ctx), grad_outputs, ctx.gate
        if torch.is_grad_enabled():  # A second derivative needs the way back to x.
            return *torch.autograd.grad(_product(x, gate), x, grad, create_graph=True), None, None, None
        if ctx.backend is not None:
            with entered(ctx.backend):
                return ops.gated_activation_backward(grad, x, gate.name), None, None, None
        hidden, argument = x.chunk(2, dim=-1)
        result = x.new_empty(x.shape)  # Autograd would make the two halves, and copy them.
        of_hidden, of_argument = result.chunk(2, dim=-1)
        torch.mul(grad, gate.function(argument), out=of_hidden)
        gate.backward(grad * hidden, argument, grad_input=of_argument)
        return result, None, None, None
