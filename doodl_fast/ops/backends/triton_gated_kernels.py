"""The Triton kernels of gated activations: the layer, and the gradient of its input.

A program computes a block of one row, so that no element's place takes a division.
"""

# This file has no `from __future__ import annotations`, because Triton reads the types of arguments from annotations.

import triton
import triton.language as tl

from .triton_kernels import _load, _store, _to_bfloat16

ROOT_HALF = tl.constexpr(0.70710678118654752440)
DENSITY = tl.constexpr(0.39894228040143267794)
"""The density of the normal distribution at zero, 1 / sqrt(2 pi)."""
SLOPE = tl.constexpr(1.59576912160573071176)
"""sqrt(8 / pi). The GELU with a hyperbolic tangent is x sigmoid(SLOPE (x + CUBIC x^3))."""
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _activation(gate, ACTIVATION: tl.constexpr):
    """Returns an activation and its derivative. ACTIVATION: its number in `gated_op.ACTIVATIONS`."""
    if ACTIVATION == 0:
        share = 0.5 * (1.0 + tl.erf(gate * tl.full((), ROOT_HALF, gate.dtype)))
        slope = share + gate * (tl.full((), DENSITY, gate.dtype) * tl.exp(-0.5 * gate * gate))
    elif ACTIVATION == 1:
        cubic, by = tl.full((), CUBIC, gate.dtype), tl.full((), SLOPE, gate.dtype)
        square = gate * gate
        share = 1.0 / (1.0 + tl.exp(-by * gate * (1.0 + cubic * square)))
        slope = share + gate * share * (1.0 - share) * by * (1.0 + 3.0 * cubic * square)
    else:
        share = 1.0 / (1.0 + tl.exp(-gate))
        slope = share * (1.0 + gate * (1.0 - share))
    return gate * share, slope


@triton.jit
def _rounded(value, ptr):
    """Returns what reading would give after value was written to ptr: PyTorch's layers write what is in between."""
    if ptr.dtype.element_ty == tl.bfloat16:  # The interpreter's cast flushes subnormals.
        bits = _to_bfloat16(value).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return value.to(ptr.dtype.element_ty).to(value.dtype)


@triton.jit
def _row(half, BLOCK: tl.constexpr):
    """Returns where this program's row begins in a tensor of halves, and the elements of the row that it computes."""
    return tl.program_id(0).to(tl.int64) * half, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def gated_kernel(y_ptr, x_ptr, half, COMPUTE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a block of y."""
    first, element = _row(half, BLOCK)
    mask = element < half
    hidden = _load(x_ptr, 2 * first + element, mask, COMPUTE)
    value, _ = _activation(_load(x_ptr, 2 * first + half + element, mask, COMPUTE), ACTIVATION)
    _store(y_ptr, first + element, hidden * _rounded(value, x_ptr), mask)


@triton.jit
def gated_backward_kernel(
    out_ptr, grad_ptr, x_ptr, half, COMPUTE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes a block of each half of the gradient of x."""
    first, element = _row(half, BLOCK)
    mask = element < half
    grad = _load(grad_ptr, first + element, mask, COMPUTE)
    hidden = _load(x_ptr, 2 * first + element, mask, COMPUTE)
    value, slope = _activation(_load(x_ptr, 2 * first + half + element, mask, COMPUTE), ACTIVATION)
    _store(out_ptr, 2 * first + element, grad * _rounded(value, x_ptr), mask)
    _store(out_ptr, 2 * first + half + element, _rounded(grad * hidden, x_ptr) * slope, mask)
