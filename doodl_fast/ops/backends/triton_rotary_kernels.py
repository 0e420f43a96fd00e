"""The Triton kernels of rotary embeddings: the rotation, and the gradient of its input.

A program computes a block of one token, whose heads share a row of the tables.
"""

# This file has no `from __future__ import annotations`, because Triton reads the types of arguments from annotations.

import triton
import triton.language as tl

from .triton_gated_kernels import _rounded
from .triton_kernels import _load, _store


@triton.jit
def _places(rows, heads, size, HALVES: tl.constexpr, BLOCK: tl.constexpr):
    """Returns where this program's token and row of the tables begin, and for its elements: their places in the token,
    those of the other elements of their pairs, their channels, those of the others, and whether they come first."""
    token = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = element % size
    if HALVES:
        is_first = channel < size // 2
        step = tl.where(is_first, size // 2, -(size // 2))
    else:
        is_first = channel % 2 == 0
        step = tl.where(is_first, 1, -1)
    return token * heads * size, (token % rows) * size, element, element + step, channel, channel + step, is_first


@triton.jit
def rotary_kernel(
    y_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    heads,
    size,
    COMPUTE: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a block of y. rows: those of the tables."""
    first, row, element, other, channel, _, is_first = _places(rows, heads, size, HALVES, BLOCK)
    mask = element < heads * size
    x, partner = _load(x_ptr, first + element, mask, COMPUTE), _load(x_ptr, first + other, mask, COMPUTE)
    cos, sin = _load(cos_ptr, row + channel, mask, COMPUTE), _load(sin_ptr, row + channel, mask, COMPUTE)
    _store(y_ptr, first + element, x * cos + tl.where(is_first, -partner, partner) * sin, mask)


@triton.jit
def rotary_backward_kernel(
    grad_x_ptr,
    grad_y_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    heads,
    size,
    COMPUTE: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a block of the gradient of x. rows: those of the tables."""
    first, row, element, other, channel, other_channel, is_first = _places(rows, heads, size, HALVES, BLOCK)
    mask = element < heads * size
    grad, partner = _load(grad_y_ptr, first + element, mask, COMPUTE), _load(grad_y_ptr, first + other, mask, COMPUTE)
    cos, sin = _load(cos_ptr, row + channel, mask, COMPUTE), _load(sin_ptr, row + other_channel, mask, COMPUTE)
    across = _rounded(partner * sin, grad_y_ptr)
    result = _rounded(grad * cos, grad_y_ptr) + tl.where(is_first, across, -across)
    _store(grad_x_ptr, first + element, result, mask)
