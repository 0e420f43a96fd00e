"""Finds out whether the ops of layers give the bits of PyTorch's own kernels on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .backends.registry import Kernel, kernel

_COMPARISONS: dict[str, Callable[[], bool]] = {}
"""By the name of an op, what compares it with PyTorch's kernels on a few tensors. The files of the ops enter it."""


def compared(op: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    """Decorator: makes a function the comparison of an op with PyTorch's kernels, which says whether the bits agree."""

    def enter(comparison: Callable[[], bool]) -> Callable[[], bool]:
        _COMPARISONS[op] = comparison
        return comparison

    return enter


def matches_torch(op: str = "group_norm_silu") -> bool:
    """Whether an op and its gradient give the bits of PyTorch's own kernels here, for contiguous tensors on the CPU.

    That depends on the chosen backend, on the processor, and on the compiler that PyTorch was built with. So both are
    compared on a few tensors when this is first called, once for one thread and once for several.

    Args:
        op: "group_norm_silu", for float32; "gated_activation", with GELU and SiLU, for tensors of several rows in
            float32, bfloat16 and float16; "modulated_norm", for float32 with `center=True` and a multiple of 8
            channels; "quick_gelu" or "rotary_embedding", for float32, bfloat16 and float16.

    Raises:
        ValueError: No op of that name is compared.

    Example:
        >>> fused = ops.matches_torch()  # Use the fused op where it changes no bit.
    """
    if op not in _COMPARISONS:
        raise ValueError(f"op: expected one of {', '.join(map(repr, _COMPARISONS))}, got {op!r}")
    return _matches_torch(op, kernel("cpu", op), torch.get_num_threads() > 1)


@functools.cache
def _matches_torch(op: str, computing: Kernel, threaded: bool) -> bool:
    """Compares both for `matches_torch`. The arguments tell apart what the result depends on."""
    # What counts the memory or the calls of a network in a dispatch mode must not see the comparison.
    with _disable_current_modes():
        return _COMPARISONS[op]()
