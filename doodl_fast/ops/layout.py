"""What all ops have in common: memory layouts, the dtype of the arithmetic, rounding, and checks of operands.

A kernel takes memory as flat, so every tensor of a call is brought to one dense layout. It is the target's own layout
if that is contiguous or channels_last, and then the target is not copied; else it is the contiguous layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = frozenset(DTYPES)


def dense_format(tensor: Tensor) -> torch.memory_format:
    """Returns the memory format that a call's tensors are brought to and its outputs have, from the target's."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def new(shape: Sequence[int], dtype: torch.dtype, like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Returns an uninitialised tensor on the device of `like`."""
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Returns the dtype of an op's arithmetic: float64 if any operand has it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def vanishes(coefficient: float, dtype: torch.dtype) -> bool:
    """Whether a coefficient is zero once it is rounded to the dtype of the arithmetic.

    In float32 that is so up to a magnitude of 2^-150, which is half of the smallest subnormal number.
    """
    return coefficient == 0 or (dtype == torch.float32 and abs(coefficient) <= 2.0**-150)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a float32 or float64 tensor rounded once to a dtype, to nearest even.

    PyTorch casts float64 to float16 and bfloat16 by way of float32, which rounds twice. That is wrong only if the
    float32 number is in the middle of two numbers of the dtype and the float64 number is not, so there the float32
    number is first moved towards it. No operation looks at bits, as torch.vmap has no rule for these in every version.
    """
    if value.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return value.to(dtype)
    near = value.float()
    back, once = near.double(), near.to(dtype)
    mirrored = near + (near - once.float())  # In the middle, this is the other one of the two neighbours.
    middle = (mirrored == mirrored.to(dtype).float()) & (mirrored != near) & (back != value)
    return torch.where(middle, torch.nextafter(near, ((value - back) * torch.inf).float()), near).to(dtype)


def store(out: Tensor, value: Tensor) -> None:
    """Writes a value into an output, rounded once to the output's dtype."""
    out.copy_(rounded(value, out.dtype))


def check_floating(**tensors: Tensor | None) -> None:
    """Raises TypeError unless each tensor is None or has dtype float16, bfloat16, float32 or float64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected fp16, bf16, fp32 or fp64, got {tensor.dtype}")


def check_same(reference: str, expected: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError or TypeError unless each tensor is None or has the shape, dtype and device of `expected`.

    reference: The name of `expected` in the error.
    """
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
    """Raises ValueError or TypeError, which names the argument, if the operands do not fit together.

    It is called before every kernel, so it tests everything together first, and finds out what is wrong afterwards.
    """
    dtype, shape, device = target.dtype, target.shape, target.device
    good = dtype in _DTYPES and (
        source is None or (source.dtype is dtype and source.shape == shape and source.device == device)
    )
    if good and eps is not None and eps.dtype in _DTYPES and eps.device == device:
        size = eps.shape
        if size == shape if g is None else (len(shape) > 0 and size[0] == 2 * shape[0] and size[1:] == shape[1:]):
            return
    # Either eps is None, or something does not fit: these checks say what.
    check_floating(target=target, eps=eps)
    check_same("target", target, source=source)
    check_eps(target, eps, g)


def check_out(target: Tensor, outs: dict[str, Tensor], operands: Sequence[Tensor | None]) -> None:
    """Raises ValueError or TypeError unless the results of a call can be written into `outs`.

    Args:
        target: The target of the call, whose shape, dtype, device and layout the outputs must have.
        outs: The outputs by the names that the error gives them.
        operands: The tensors that the call reads, with which no output may share memory.
    """
    check_same("target", target, **outs)
    if torch.compiler.is_dynamo_compiling():  # The result is then copied, and may go to shared or strided memory.
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
    """Raises ValueError unless eps has the shape that goes with the target, (B, ...) or with guidance (2B, ...)."""
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
    """Returns the shape that the network's output has for a target. Raises ValueError for a guided 0-dim target."""
    shape = list(target.shape)
    if guided:
        if not shape:
            raise ValueError("target: expected a leading batch dimension for guidance, got a 0-dim tensor")
        shape[0] *= 2
    return shape
