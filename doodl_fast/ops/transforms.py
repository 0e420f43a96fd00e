"""Finds out which of three ways a call of an op takes: the kernel, the registered op, or a formula in plain PyTorch.

- The kernel is called directly if no gradient is wanted and nothing traces or transforms the call.
- The registered op `torch.ops.doodl_fast.*` is called for reverse-mode gradients, `torch.compile` and subclasses of
  Tensor.
- The formula, which has the same operations as the eager kernel, is computed if PyTorch must see these operations one
  by one: under forward-mode differentiation (`torch.autograd.forward_ad`, `torch.func.jvp`), `torch.func.grad`,
  `torch.func.vmap`, for batched gradients, and for gradients of a vector-Jacobian product. Its results have the same
  bits as those of the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_tls_is_dispatch_key_included as _is_active  # type: ignore[attr-defined]
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

from .layout import rounded

# PyTorch's older vmap, which is_grads_batched and vectorize=True use, switches this key on for its thread.
_OLDER_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")  # type: ignore[attr-defined]


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether the kernels may be called directly: no gradient is wanted, and nothing traces or transforms the call.

    A call through the dispatcher to a registered op takes several times as long as a kernel takes on latents. This test
    runs before every kernel, so it is written for speed.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None or _is_active(_OLDER_VMAP):
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:  # This loop takes half the time of all() with a generator.
        if tensor is not None and (type(tensor) is not Tensor or (grad and tensor.requires_grad)):
            return False
    return True


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is active, or one of the tensors carries a forward-mode tangent."""
    if torch.compiler.is_dynamo_compiling():
        return False
    if peek_interpreter_stack() is not None:
        return True
    return has_tangent(*tensors) or any(z is not None and is_legacy_batchedtensor(z) for z in tensors)


def needs_formula(*tensors: Tensor | None) -> bool:
    """Whether an op that has no registered gradient must be computed by its formula."""
    if is_transformed(*tensors):
        return True
    return not torch.compiler.is_dynamo_compiling() and wants_gradient(*tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors carries a forward-mode tangent at the present level."""
    if forward_ad._current_level < 0:
        return False
    return any(
        forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
        if tensor is not None and tensor.is_floating_point()
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a reverse-mode gradient of one of the tensors is wanted."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError if a derivative or a batched call is asked of an op that has none."""
    if torch.compiler.is_dynamo_compiling():
        return
    if peek_interpreter_stack() is not None:
        raise RuntimeError(f"{op}: expected a call outside torch.func's transforms (vmap, grad, jvp, ...); it has none")
    if has_tangent(*tensors) or wants_gradient(*tensors):
        raise RuntimeError(
            f"{op}: expected tensors without a gradient or a tangent, as rounding to integers has no derivative; "
            "call it under torch.no_grad() or on detached tensors"
        )


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError if a registered op, which would drop a forward-mode tangent, is called with one."""
    if forward_ad._current_level < 0:
        return
    # A registered op that changes an argument is called with the key ADInplaceOrView switched off, without which
    # torch 2.11 cannot read a tangent.
    private: Any = torch._C
    excluded = private._dispatch_tls_local_exclude_set().remove(private.DispatchKey.ADInplaceOrView)
    with private._ForceDispatchKeyGuard(private._dispatch_tls_local_include_set(), excluded):
        tangent = has_tangent(*tensors)
    if tangent:
        raise RuntimeError(
            f"torch.ops.doodl_fast.{op}: the registered op has no forward-mode derivative; call doodl_fast.ops.{op} "
            "instead, and not under torch.compile"
        )


class _Rounded(torch.autograd.Function):
    """The function `layout.rounded` with a derivative, which is that of a cast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded(value, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.wide, ctx.narrow = inputs[0].dtype, inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.wide), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return tangent.to(ctx.narrow)


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor rounded once to a dtype. It is differentiable in every mode."""
    if value.dtype == dtype:
        return value
    if value.dtype == torch.float64 and dtype in (torch.float16, torch.bfloat16):
        result: Tensor = _Rounded.apply(value, dtype)
        return result
    return value.to(dtype)
