"""The Triton kernels of the floating-point ops, with the operations of csrc/scalar.h in the same order.

This module can be imported only where triton is installed. Coefficients are float64 arguments that the kernel rounds to
the dtype of the arithmetic. Launches switch the fusion of multiply-adds off (`enable_fp_fusion=False`). Memory is flat
and offsets have 64 bits. A block of 1024 elements on four warps lets every thread load 16 bytes at once.
"""

# This file has no `from __future__ import annotations`, because Triton reads the types of arguments from annotations.

import triton
import triton.language as tl


@triton.jit
def _load(pointer, offsets, mask, COMPUTE: tl.constexpr):
    """Returns a block of elements in the dtype of the arithmetic."""
    value = tl.load(pointer + offsets, mask=mask, other=0.0)
    if value.dtype == tl.bfloat16:  # The interpreter's cast flushes subnormals.
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(COMPUTE)


@triton.jit
def _to_bfloat16(value):
    """Returns float32 rounded to the nearest bfloat16, by its bits, because the interpreter's cast truncates."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = tl.where(value != value, 0x7FC0, bits)
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _store(pointer, offsets, value, mask):
    """Writes a block, rounded once. float64 goes to fp16 by way of float32, rounded to odd (see `layout.rounded`)."""
    wide: tl.constexpr = value.dtype == tl.float64
    half: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth == 16
    if wide and half:
        near = value.to(tl.float32)
        back = near.to(tl.float64)
        bits = near.to(tl.int32, bitcast=True)
        bits = tl.where(tl.abs(back) > tl.abs(value), bits - 1, bits)
        bits = tl.where(back != value, bits | 1, bits)
        value = bits.to(tl.float32, bitcast=True)
    if pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer + offsets, _to_bfloat16(value), mask=mask)
    else:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _mixed(first, second, a0, c0, a1, c1, HAS_C0: tl.constexpr, HAS_C1: tl.constexpr):
    """Returns both values after the mixing."""
    first = first * a0
    if HAS_C0:
        first = first + second * c0
    second = second * a1
    if HAS_C1:
        second = second + first * c1
    return first, second


@triton.jit
def _transposed(first, second, a0, c0, a1, c1, HAS_C0: tl.constexpr, HAS_C1: tl.constexpr):
    """Returns the cotangents before the mixing, from those after it."""
    if HAS_C1:
        first = first + second * c1
    second = second * a1
    if HAS_C0:
        second = second + first * c0
    return first * a0, second


@triton.jit
def coupling_kernel(
    out_ptr,
    out_source_ptr,
    target_ptr,
    source_ptr,
    eps_ptr,
    n,
    a: tl.float64,
    c: tl.float64,
    b: tl.float64,
    g: tl.float64,
    a0: tl.float64,
    c0: tl.float64,
    a1: tl.float64,
    c1: tl.float64,
    COMPUTE: tl.constexpr,
    SOURCE: tl.constexpr,
    EPS: tl.constexpr,
    GUIDED: tl.constexpr,
    MIXES: tl.constexpr,
    TARGET_FIRST: tl.constexpr,
    HAS_C0: tl.constexpr,
    HAS_C1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes `a t + c s + b eps`, and with MIXES the mixing after it."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    result = _load(target_ptr, offsets, mask, COMPUTE) * tl.full((), a, COMPUTE)
    if SOURCE or MIXES:
        source = _load(source_ptr, offsets, mask, COMPUTE)
    if SOURCE:
        result = result + source * tl.full((), c, COMPUTE)
    if EPS:
        eps = _load(eps_ptr, offsets, mask, COMPUTE)
        if GUIDED:
            cond = _load(eps_ptr + n, offsets, mask, COMPUTE)
            eps = eps + (cond - eps) * tl.full((), g, COMPUTE)
        result = result + eps * tl.full((), b, COMPUTE)
    if MIXES:
        a0, c0 = tl.full((), a0, COMPUTE), tl.full((), c0, COMPUTE)
        a1, c1 = tl.full((), a1, COMPUTE), tl.full((), c1, COMPUTE)
        if TARGET_FIRST:
            result, source = _mixed(result, source, a0, c0, a1, c1, HAS_C0, HAS_C1)
        else:
            source, result = _mixed(source, result, a0, c0, a1, c1, HAS_C0, HAS_C1)
        _store(out_source_ptr, offsets, source, mask)
    _store(out_ptr, offsets, result, mask)


@triton.jit
def vjp_kernel(
    out_ptr,
    out_source_ptr,
    out_eps_ptr,
    grad_ptr,
    grad_source_ptr,
    scale_ptr,
    n,
    a: tl.float64,
    c: tl.float64,
    b: tl.float64,
    g: tl.float64,
    a0: tl.float64,
    c0: tl.float64,
    a1: tl.float64,
    c1: tl.float64,
    COMPUTE: tl.constexpr,
    SOURCE: tl.constexpr,
    EPS: tl.constexpr,
    SCALED: tl.constexpr,
    GUIDED: tl.constexpr,
    MIXES: tl.constexpr,
    TARGET_FIRST: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_C0: tl.constexpr,
    HAS_C1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the vector-Jacobian product of what `coupling_kernel` computes."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    grad = _load(grad_ptr, offsets, mask, COMPUTE)
    if MIXES:
        other = _load(grad_source_ptr, offsets, mask, COMPUTE)
        a0, c0 = tl.full((), a0, COMPUTE), tl.full((), c0, COMPUTE)
        a1, c1 = tl.full((), a1, COMPUTE), tl.full((), c1, COMPUTE)
        if TARGET_FIRST:
            grad, other = _transposed(grad, other, a0, c0, a1, c1, HAS_C0, HAS_C1)
        else:
            other, grad = _transposed(other, grad, a0, c0, a1, c1, HAS_C0, HAS_C1)
        if HAS_C:
            other = other + grad * tl.full((), c, COMPUTE)
        _store(out_source_ptr, offsets, other, mask)
    elif SOURCE:
        _store(out_source_ptr, offsets, grad * tl.full((), c, COMPUTE), mask)
    if EPS:
        cotangent = grad * tl.full((), b, COMPUTE)
        if SCALED:
            cotangent = cotangent * tl.load(scale_ptr).to(COMPUTE)
        if GUIDED:
            to_cond = cotangent * tl.full((), g, COMPUTE)
            _store(out_eps_ptr + n, offsets, to_cond, mask)
            cotangent = cotangent - to_cond
        _store(out_eps_ptr, offsets, cotangent, mask)
    _store(out_ptr, offsets, grad * tl.full((), a, COMPUTE), mask)


@triton.jit
def _descended(z, m, gradient, noise, clip, momentum, sigma, NESTEROV: tl.constexpr, NOISY: tl.constexpr):
    """Returns a latent and its momentum after a step, from a gradient that the rate has multiplied already."""
    gradient = tl.where(gradient < -clip, -clip, tl.where(gradient > clip, clip, gradient))  # NaN stays NaN.
    m = m * momentum + gradient
    move = m
    if NESTEROV:
        move = m * momentum + gradient
    z = z - move
    if NOISY:
        z = z + noise * sigma
    return z, m


@triton.jit
def update_kernel(
    x_ptr,
    y_ptr,
    mx_ptr,
    my_ptr,
    sums_ptr,
    in_x_ptr,
    in_y_ptr,
    in_mx_ptr,
    in_my_ptr,
    gx_ptr,
    gy_ptr,
    noise_ptr,
    sample,
    rate: tl.float64,
    clip: tl.float64,
    momentum: tl.float64,
    sigma: tl.float64,
    COMPUTE: tl.constexpr,
    SQUARES: tl.constexpr,
    NESTEROV: tl.constexpr,
    TIED: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one block of one sample. Sums of squares go to sums (2, B, blocks), which are added in a fixed order."""
    inside = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < sample
    offsets = tl.program_id(1).to(tl.int64) * sample + inside
    rate, clip = tl.full((), rate, COMPUTE), tl.full((), clip, COMPUTE)
    momentum, sigma = tl.full((), momentum, COMPUTE), tl.full((), sigma, COMPUTE)
    gx = _load(gx_ptr, offsets, mask, COMPUTE) * rate
    gy = _load(gy_ptr, offsets, mask, COMPUTE) * rate
    if TIED:
        gx = (gx + gy) * 0.5
        gy = gx
    noise = gx
    if NOISY:
        noise = _load(noise_ptr, offsets, mask, COMPUTE)
    x, mx = _load(in_x_ptr, offsets, mask, COMPUTE), _load(in_mx_ptr, offsets, mask, COMPUTE)
    y, my = _load(in_y_ptr, offsets, mask, COMPUTE), _load(in_my_ptr, offsets, mask, COMPUTE)
    x, mx = _descended(x, mx, gx, noise, clip, momentum, sigma, NESTEROV, NOISY)
    y, my = _descended(y, my, gy, noise, clip, momentum, sigma, NESTEROV, NOISY)
    if TIED:
        x = (x + y) * 0.5
        y = x
    _store(x_ptr, offsets, x, mask)
    _store(y_ptr, offsets, y, mask)
    _store(mx_ptr, offsets, mx, mask)
    _store(my_ptr, offsets, my, mask)
    if SQUARES:
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        blocks = tl.num_programs(0) * tl.num_programs(1)
        wide_x, wide_y = tl.where(mask, x, 0.0).to(tl.float64), tl.where(mask, y, 0.0).to(tl.float64)
        tl.store(sums_ptr + place, tl.sum(wide_x * wide_x, 0))
        tl.store(sums_ptr + blocks + place, tl.sum(wide_y * wide_y, 0))


@triton.jit
def scale_kernel(x_ptr, y_ptr, factors_ptr, sample, BLOCK: tl.constexpr):
    """Multiplies each sample of x and y by its factor, in place. factors: (2, B)."""
    inside = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < sample
    row = tl.program_id(1)
    offsets = row.to(tl.int64) * sample + inside
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0) * tl.load(factors_ptr + row)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0) * tl.load(factors_ptr + tl.num_programs(1) + row)
    tl.store(x_ptr + offsets, x, mask=mask)
    tl.store(y_ptr + offsets, y, mask=mask)
