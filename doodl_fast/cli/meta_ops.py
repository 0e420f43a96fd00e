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
    pays, modulated_pays, gated_pays = group_norm._pays, modulated_norm._pays, gated._pays
    rotary_pays = rotary._pays
    quick_pays = quick_gelu._pays

    def is_used(x: Tensor) -> bool:
        return x.is_meta or pays(x)

    def is_modulated(x: Tensor, same_bits: bool) -> bool:
        return x.shape[-1] <= modulated_norm.MOST if x.is_meta else modulated_pays(x, same_bits)

    def is_gated(x: Tensor) -> bool:
        return gated._fits(x) if x.is_meta else gated_pays(x)

    def is_rotary(x: Tensor) -> bool:
        return x.is_meta or rotary_pays(x)

    def is_quick(x: Tensor) -> bool:
        return quick_gelu._fits(x) if x.is_meta else quick_pays(x)

    with (
        mock.patch.object(group_norm, "_pays", is_used),
        mock.patch.object(ops, "group_norm_silu", _on_meta(ops.group_norm_silu, _forward)),
        mock.patch.object(ops, "group_norm_silu_backward", _on_meta(ops.group_norm_silu_backward, _backward)),
        mock.patch.object(modulated_norm, "_pays", is_modulated),
        mock.patch.object(ops, "modulated_norm", _on_meta(ops.modulated_norm, _modulated)),
        mock.patch.object(ops, "modulated_norm_backward", _on_meta(ops.modulated_norm_backward, _backward)),
        mock.patch.object(gated, "_pays", is_gated),
        mock.patch.object(ops, "gated_activation", _on_meta(ops.gated_activation, _gated)),
        mock.patch.object(ops, "gated_activation_backward", _on_meta(ops.gated_activation_backward, _backward)),
        mock.patch.object(rotary, "_pays", is_rotary),
        mock.patch.object(ops, "rotary_embedding", _on_meta(ops.rotary_embedding, _like)),
        mock.patch.object(ops, "rotary_embedding_backward", _on_meta(ops.rotary_embedding_backward, _like)),
        mock.patch.object(quick_gelu, "_pays", is_quick),
        mock.patch.object(ops, "quick_gelu", _on_meta(ops.quick_gelu, torch.empty_like)),
        mock.patch.object(ops, "quick_gelu_backward", _on_meta(ops.quick_gelu_backward, _backward)),
    ):
        yield


def _on_meta(function: Any, other: Any) -> Any:
    """A function, or another in its place where its first argument is on the meta device."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (other if x.is_meta else function)(x, *args, **kwargs)

    return call


def _forward(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _modulated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    center, rstd = rest[-1], x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(rstd) if center else rstd.new_empty(0), rstd


def _gated(x: Tensor, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _backward(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _like(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)
