"""Quick GELU (OpenAI's CLIP) that keeps its argument alone, as one op where that is as exact as PyTorch's operators.

PyTorch reads and writes tensors once for each of three operators, and for each of six in a gradient. The op
`ops.quick_gelu` makes one pass, and its gradient another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import level
from .functions import entered
from .gated import may_be_one_op
from .recipes import load, recipe_of, remember, save

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quick_gelu(x: Tensor) -> Tensor | None:
    """Computes quick GELU by the op, and keeps x or what it follows from. It is None where the op is not used.

    The op may round differently on a GPU. So whether it is called must depend neither on the level of lean layers,
    which may change in a run, nor on whether there is a graph.

    Args:
        x: The layer's input.
    """
    if x.numel() < level.SMALL or not may_be_one_op(x) or not _pays(x):
        return None
    if not (x.requires_grad and torch.is_grad_enabled()):
        return ops.quick_gelu(x)
    backend = ops.choice()
    result: Tensor = _QuickGelu.apply(x, recipe_of(x) or x, backend)  # type: ignore[no-untyped-call]
    return remember(result, _again, x, backend)


def by_operators(x: Tensor) -> Tensor:
    """Computes quick GELU by PyTorch's operators, as diffusers' and transformers' layers do."""
    return x * torch.sigmoid(1.702 * x)


def _pays(x: Tensor) -> bool:
    """Whether the op is faster than PyTorch's operators, and as exact.

    On a CPU it must be the native kernel and have the bits of PyTorch. On a GPU it rounds where PyTorch does or less
    often, and its exponential function may differ in the last place. This depends on x's device, dtype and layout
    alone.
    """
    if not (_fits(x) and ops.has_kernel("quick_gelu", x)):
        return False
    return x.is_cuda or (x.is_cpu and ops.matches_torch("quick_gelu"))


def _fits(x: Tensor) -> bool:
    """Whether the op takes a tensor as it is, on whatever device it is."""
    return x.dtype in _DTYPES and x.is_contiguous()


def _again(x: Tensor, backend: str) -> Tensor:
    """Computes the layer once more, for a gradient of what follows it."""
    with entered(backend):
        return ops.quick_gelu(x)


class _QuickGelu(torch.autograd.Function):
    """Quick GELU, which keeps its argument, or what that follows from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Any, backend: str) -> Tensor:
        save(ctx, kept)
        ctx.backend = backend
        return ops.quick_gelu(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = load(ctx), grad_outputs
        if torch.is_grad_enabled():  # A second derivative needs the way back to x.
            return *torch.autograd.grad(by_operators(x), x, grad, create_graph=True), None, None
        with entered(ctx.backend):
            return ops.quick_gelu_backward(grad, x), None, None
