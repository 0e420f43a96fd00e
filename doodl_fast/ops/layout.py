"""What all ops share: memory layouts, the dtype of the arithmetic, rounding, checks.

Kernels see flat memory only: every tensor of a call is brought to one dense layout, the target's own when that is
contiguous or channels_last (then nothing is copied), else the contiguous one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = frozenset(DTYPES)


def dense_format(tensor: Tensor) -> torch.memory_format:
    """The memory format that a call's tensors are brought to, and that its outputs have."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def new(shape: Sequence[int], dtype: torch.dtype, like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """An uninitialised tensor of like's device."""
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any operand has it, else float32: coefficients are rounded to it, and all arithmetic is done in it."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def vanishes(coefficient: float, dtype: torch.dtype) -> bool:
    """Whether a coefficient is zero once it is rounded to the dtype of the arithmetic: 2^-150 is still rounded to 0."""
    return coefficient == 0 or (dtype == torch.float32 and abs(coefficient) <= 2.0**-150)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` (float32 or float64) rounded once to `dtype`, to nearest even.

    torch casts float64 to fp16 and bf16 by way of float32, which rounds twice. Rounding to odd on the way makes the
    second rounding the only one that counts (Boldo and Melquiond, IEEE Trans. Comput. 57(4), 2008): float32 has more
    than two bits beyond either.
    """
    if value.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return value.to(dtype)
    near = value.float()
    back = near.double()
    bits = near.view(torch.int32)
    bits = torch.where(back.abs() > value.abs(), bits - 1, bits)  # towards zero, whatever the sign
    bits = torch.where(back != value, bits | 1, bits)
    return bits.view(torch.float32).to(dtype)


def store(out: Tensor, value: Tensor) -> None:
    """Writes `value`, rounded once, into an output."""
    out.copy_(rounded(value, out.dtype))


def check_floating(**tensors: Tensor | None) -> None:
    """Raises TypeError unless each is a tensor of fp16, bf16, fp32 or fp64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected fp16, bf16, fp32 or fp64, got {tensor.dtype}")


def check_same(reference: str, expected: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError or TypeError unless each has the reference's shape, dtype and device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != expected.shape:
            raise ValueError(f"{name}: expected {reference}'s shape {tuple(expected.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != expected.dtype:
            raise TypeError(f"{name}: expected {reference}'s dtype {expected.dtype}, got {tensor.dtype}")
        if tensor.device != expected.device:
            raise ValueError(f"{name}: expected {reference}'s device {expected.device}, got {tensor.device}")


def check_operands(target: Tensor, source: Tensor | None, eps: Tensor | None, g: float | None) -> None:
    """Raises ValueError or TypeError, naming the argument, for operands that do not fit together."""
    dtype, shape, device = target.dtype, target.shape, target.device
    good = dtype in _DTYPES and (
        source is None or (source.dtype is dtype and source.shape == shape and source.device == device)
    )
    if good and eps is not None and eps.dtype in _DTYPES and eps.device == device:
        size = eps.shape
        if size == shape if g is None else (len(shape) > 0 and size[0] == 2 * shape[0] and size[1:] == shape[1:]):
            return
    # something is wrong, or eps is not there: the checks that say what
    check_floating(target=target, eps=eps)
    check_same("target", target, source=source)
    check_eps(target, eps, g)


def check_out(target: Tensor, outs: dict[str, Tensor], operands: Sequence[Tensor | None]) -> None:
    """Raises ValueError or TypeError unless results for a target can be written into `outs`, given by name."""
    check_same("target", target, **outs)
    if torch.compiler.is_dynamo_compiling():  # the result is copied then: shared and strided memory are fine
        return
    layout, taken = dense_format(target), {z.untyped_storage().data_ptr() for z in operands if z is not None}
    for name, out in outs.items():
        if not out.is_contiguous(memory_format=layout):
            raise ValueError(f"{name}: expected dense memory in {layout}, got strides {out.stride()}; use empty_like()")
        if out.numel() and out.untyped_storage().data_ptr() in taken:
            raise ValueError(f"{name}: expected memory of its own, got that of another argument; use empty_like()")
        taken.add(out.untyped_storage().data_ptr())
    if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (*operands, *outs.values())):
        raise ValueError("out: expected no gradient to be wanted; call it under torch.no_grad(), or without out")


def check_eps(target: Tensor, eps: Tensor | None, g: float | None) -> None:
    """Raises ValueError unless eps fits the target: (B, ...), or (2B, ...) with guidance."""
    if eps is None:
        if g is not None:
            raise ValueError(f"g: expected None without eps, got {g}")
        return
    expected = eps_shape(target, g is not None)
    if list(eps.shape) != expected:
        kind = "[uncond; cond] of twice the target's batch" if g is not None else "the target's shape"
        raise ValueError(f"eps: expected {kind}, {tuple(expected)}, got {tuple(eps.shape)}")
    if eps.device != target.device:
        raise ValueError(f"eps: expected the target's device {target.device}, got {eps.device}")


def eps_shape(target: Tensor, guided: bool) -> list[int]:
    """The shape of the network's output that goes with a target."""
    shape = list(target.shape)
    if guided:
        if not shape:
            raise ValueError("target: expected a leading batch dimension for guidance, got a 0-dim tensor")
        shape[0] *= 2
    return shape
