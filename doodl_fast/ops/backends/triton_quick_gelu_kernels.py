"""The Triton kernels of quick GELU: the layer, and the gradient of its input. A program computes a block."""

# This file has no `from __future__ import annotations`, because Triton reads the types of arguments from annotations.

import triton
import triton.language as tl

from .triton_gated_kernels import _rounded
from .triton_kernels import _load, _store

FACTOR = tl.constexpr(1.702)


@triton.jit
def _block(n, BLOCK: tl.constexpr):
    """Returns the elements that this program computes, and which of them are there."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return element, element < n


@triton.jit
def _sigmoid(x, ptr):
    """Returns sigmoid(1.702 x), and 1.702. The argument and the result are rounded to the dtype that ptr has."""
    factor = tl.full((), FACTOR, x.dtype)
    return _rounded(1.0 / (1.0 + tl.exp(-_rounded(factor * x, ptr))), ptr), factor


@triton.jit
def quick_gelu_kernel(y_ptr, x_ptr, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a block of y."""
    element, mask = _block(n, BLOCK)
    x = _load(x_ptr, element, mask, COMPUTE)
    sigmoid, _ = _sigmoid(x, x_ptr)
    _store(y_ptr, element, x * sigmoid, mask)


@triton.jit
def quick_gelu_backward_kernel(out_ptr, grad_ptr, x_ptr, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a block of the gradient of x."""
    element, mask = _block(n, BLOCK)
    x, grad = _load(x_ptr, element, mask, COMPUTE), _load(grad_ptr, element, mask, COMPUTE)
    sigmoid, factor = _sigmoid(x, x_ptr)
    of_argument = _rounded(_rounded(grad * x, x_ptr) * (1.0 - sigmoid) * sigmoid, x_ptr)
    _store(out_ptr, element, _rounded(grad * sigmoid, x_ptr) + _rounded(of_argument * factor, x_ptr), mask)
