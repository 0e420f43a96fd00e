"""How Triton kernels are launched, and the constants that they have in common."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from ..layout import compute_dtype, vanishes

BLOCK = 1024
WARPS = 4


def warps_for(elements: int) -> int:
    """Returns how many warps compute a program's elements: of many, each thread would have too many in registers."""
    return WARPS if elements <= 2 * BLOCK else min(16, elements // 512)


@functools.cache
def _kernel(name: str) -> Any:
    """The kernel of a name. Triton is imported when one is asked for."""
    from . import (
        triton_gated_kernels,
        triton_kernels,
        triton_lattice,
        triton_layer_kernels,
        triton_norm_kernels,
        triton_quick_gelu_kernels,
        triton_rotary_kernels,
    )

    modules = (
        *(triton_kernels, triton_lattice, triton_layer_kernels, triton_gated_kernels, triton_norm_kernels),
        *(triton_quick_gelu_kernels, triton_rotary_kernels),
    )
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def launch(
    name: str,
    grid: tuple[int, ...],
    like: Tensor,
    *arguments: Any,
    block: int = BLOCK,
    warps: int = WARPS,
    **constants: Any,
) -> None:
    """Launches a kernel on the device of a tensor. arguments: its pointers and numbers; constants: its constexprs."""
    kernel = _kernel(name)
    if like.is_cpu:  # The interpreter takes no options of the compiler.
        kernel[grid](*arguments, **constants, BLOCK=block)
        return
    # Entering a device takes some microseconds of Python, and where there is one GPU it is the current one already.
    index = like.get_device()
    with contextlib.nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
        kernel[grid](*arguments, **constants, BLOCK=block, num_warps=warps, enable_fp_fusion=False)


def arithmetic(*tensors: Tensor | None, **coefficients: float) -> dict[str, Any]:
    """Returns constants of a kernel: the dtype of the arithmetic, and which of the coefficients are not zero in it."""
    dtype = compute_dtype(*(tensor.dtype for tensor in tensors if tensor is not None))
    there = {f"HAS_{name.upper()}": not vanishes(value, dtype) for name, value in coefficients.items()}
    return {"COMPUTE": _triton_dtype(dtype), **there}


@functools.cache
def _triton_dtype(dtype: torch.dtype) -> Any:
    """Returns what Triton calls the dtype of the arithmetic."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def blocks(n: int) -> int:
    """Returns the number of blocks that cover n elements."""
    return -(-n // BLOCK)


def floats(*numbers: float | None) -> list[float]:
    """Returns the numbers as a kernel takes them: as floats, with 0 for None."""
    return [0.0 if number is None else float(number) for number in numbers]  # This keeps the sign of -0.0.
