"""The ops of lean layers on the meta device, with the memory of the kernels that they have on GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .. import ops
from ..frozen import gated, group_norm, modulated_norm, quick_gelu, rotary


@contextlib.contextmanager
def fused_ops() -> Iterator[None]:
    """Lets lean layers call their ops on the meta device, as they do on GPUs with Triton (docs/lean.md).

    An op holds its result, a norm's also the statistics of groups or rows, and its gradient the input's gradient.
    """
    with contextlib.ExitStack() as stack:
        for name, (module, pays, forward, backward) in _OPS.items():
            replaced = ((module, "_pays", pays), (ops, name, forward), (ops, f"{name}_backward", backward))
            for owner, attribute, other in replaced:
                function = _on_meta(getattr(owner, attribute), other)
                stack.enter_context(mock.patch.object(owner, attribute, function))
        yield


def _on_meta(function: Any, other: Any) -> Any:
    """A function, or another in its place where its first argument is on the meta device."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (other if x.is_meta else function)(x, *args, **kwargs)

    return call


def _always(x: Tensor) -> bool:
    return True


def _is_narrow(x: Tensor, same_bits: bool) -> bool:
    return x.shape[-1] <= modulated_norm.MOST


def _forward(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _modulated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    center, rstd = rest[-1], x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(rstd) if center else rstd.new_empty(0), rstd


def _gated(x: Tensor, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _like(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _backward(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


_OPS = {
    "group_norm_silu": (group_norm, _always, _forward, _backward),
    "modulated_norm": (modulated_norm, _is_narrow, _modulated, _backward),
    "gated_activation": (gated, gated._fits, _gated, _backward),
    "quick_gelu": (quick_gelu, quick_gelu._fits, _like, _backward),
    "rotary_embedding": (rotary, _always, _like, _like),
}
"""For each op: the module of the lean layers that call it, whether they do, and what has the sizes of its results and
of its gradient."""
