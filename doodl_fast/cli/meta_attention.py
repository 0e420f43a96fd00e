"""Attention on PyTorch's meta device with the memory of a fused kernel (Dao et al., arXiv 2205.14135)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..chain.memory.tracker import Tracker


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Replaces attention by a function with the memory of a fused kernel.

    Its graph holds the inputs, the output and a logsumexp, and never the products of queries and keys. It is a patch
    and not a TorchFunctionMode, because modes are off in backward passes, where checkpointed blocks are called again.
    """
    original = nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        if has_torch_function((query,)):  # The mode that a lean attention layer is called in must see it.
            return handle_torch_function(fused, (query,), query, key, value, *rest, **options)
        return _Attention.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


class _Attention(torch.autograd.Function):
    """Attention on the meta device, which has shapes and no values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _count(2 * (q.shape[-1] + v.shape[-1]) * q[..., 0].numel() * k.shape[-2])
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        # Products of queries and keys are made again; four more products are needed for three gradients.
        _count(2 * (3 * q.shape[-1] + 2 * v.shape[-1]) * q[..., 0].numel() * k.shape[-2])
        return tuple(torch.empty_like(tensor) for tensor in (q, k, v))


def _count(operations: int) -> None:
    """Adds floating-point operations to what the trackers count that are active."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Tracker):
            mode.flops += operations
