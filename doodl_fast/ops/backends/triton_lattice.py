"""The Triton kernel of the lattice couplings, with the operations of csrc/lattice.h in the same order.

As there, divisions are of 32 bits and take more time than the memory traffic. Blocks are small, so that all values stay
in registers.
"""

# This file has no `from __future__ import annotations`, because Triton reads the types of arguments from annotations.

import triton
import triton.language as tl

from .triton_kernels import _load

BLOCK = 256
_ROUNDER = tl.constexpr(6755399441055744.0)  # This is 1.5 2^52, whose unit in the last place is 1.
_ROUNDER_BITS = tl.constexpr(0x4338000000000000)
_LARGEST_MOVE = tl.constexpr(2251799813685248.0)  # This is 2^51.


@triton.jit
def _within(n, good, outside, LIMIT: tl.constexpr):
    """Returns n where it is good and in range, else 0, and which elements were out of range so far."""
    fits = good & (n <= LIMIT) & (n >= -LIMIT)
    return tl.where(fits, n, 0), outside | (fits == 0)


@triton.jit
def _moved(n, v, outside, UNDO: tl.constexpr, LIMIT: tl.constexpr):
    """Returns n + rint(v), or minus with UNDO, and which elements were out of range so far."""
    good = (v < _LARGEST_MOVE) & (v > -_LARGEST_MOVE)  # This is false for NaN.
    rounded = tl.where(good, v, 0.0) + tl.full((), _ROUNDER, tl.float64)
    step = rounded.to(tl.int64, bitcast=True) - _ROUNDER_BITS
    n = n - step if UNDO else n + step
    return _within(n, good, outside, LIMIT)


@triton.jit
def _divided(n, over, DIGITS: tl.constexpr):
    """Returns floor(n / over) and the remainder."""
    size = tl.where(n < 0, ~n, n)
    quotient = tl.zeros_like(n)
    rest = tl.zeros_like(n).to(tl.uint32)
    for i in tl.static_range(DIGITS):
        part = (rest << 16) | ((size >> (16 * (DIGITS - 1 - i))) & 0xFFFF).to(tl.uint32)
        digit = part // over
        quotient = (quotient << 16) | digit.to(tl.int64)
        rest = part - digit * over
    rest = tl.where(n < 0, over - 1 - rest, rest)
    return tl.where(n < 0, ~quotient, quotient), rest


@triton.jit
def _scaled(n, in_ptr, out_ptr, numel, offsets, mask, by, over, WORDS: tl.constexpr, DIGITS: tl.constexpr):
    """Returns n multiplied by the fraction by / over, and writes the new information buffer."""
    by, over = tl.full((), by, tl.uint32), tl.full((), over, tl.uint32)
    stride = tl.full((), numel, tl.int64)
    quotients = ()  # The highest word comes first.
    rest = tl.zeros_like(n).to(tl.uint32)
    for i in tl.static_range(WORDS):
        word = tl.load(in_ptr + (WORDS - 1 - i) * stride + offsets, mask=mask, other=0).to(tl.uint32)
        high = (rest << 15) | (word >> 16)
        first = high // by
        low = ((high - first * by) << 16) | (word & 0xFFFF)
        second = low // by
        rest = low - second * by
        quotients = quotients + ((first << 16) | second,)  # type: ignore[assignment]  # noqa: RUF005 (no unpacking)
    whole, left = _divided(n, over, DIGITS)
    extra = left * by + rest
    more = extra // over
    carry = extra - more * over
    for w in tl.static_range(WORDS):
        part = quotients[WORDS - 1 - w].to(tl.uint64) * over.to(tl.uint64) + carry.to(tl.uint64)
        tl.store(out_ptr + w * stride + offsets, (part & 0x7FFFFFFF).to(tl.int32), mask=mask)
        carry = (part >> 31).to(tl.uint32)
    return whole * by.to(tl.int64) + more.to(tl.int64)


@triton.jit
def _mixed(
    n,
    other,
    outside,
    in_ptr,
    out_ptr,
    numel,
    offsets,
    mask,
    by,
    over,
    c,
    UNDO: tl.constexpr,
    WORDS: tl.constexpr,
    LIMIT: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """Returns n after its multiplication and the addition of rint(c other), or both undone."""
    v = other.to(tl.float64) * tl.full((), c, tl.float64)
    if UNDO:
        n, outside = _moved(n, v, outside, True, LIMIT)
        n = _scaled(n, in_ptr, out_ptr, numel, offsets, mask, by, over, WORDS, DIGITS)
        n, outside = _within(n, mask | True, outside, LIMIT)
    else:
        n = _scaled(n, in_ptr, out_ptr, numel, offsets, mask, by, over, WORDS, DIGITS)
        n, outside = _moved(n, v, outside, False, LIMIT)
    return n, outside


@triton.jit
def _network(eps_ptr, faults_ptr, n, row, offsets, mask, g, GUIDED: tl.constexpr):
    """Returns the network's output in float64, guided or not, and notes NaN and infinity in it as a fault."""
    eps = _load(eps_ptr, offsets, mask, tl.float64)
    if GUIDED:
        cond = _load(eps_ptr + n, offsets, mask, tl.float64)
        eps = eps + (cond - eps) * tl.full((), g, tl.float64)
    infinite = tl.max(((eps - eps) != 0.0).to(tl.int32), 0)
    tl.store(faults_ptr + 2 * row + 1, 1, mask=infinite > 0)
    return eps


@triton.jit(do_not_specialize=["row", "by0", "over0", "by1", "over1"])
def lattice_kernel(
    out_ptr,
    out_source_ptr,
    out_buffer_ptr,
    out_source_buffer_ptr,
    target_ptr,
    source_ptr,
    buffer_ptr,
    source_buffer_ptr,
    eps_ptr,
    faults_ptr,
    n,
    row,
    by0,
    over0,
    by1,
    over1,
    c: tl.float64,
    b: tl.float64,
    g: tl.float64,
    c0: tl.float64,
    c1: tl.float64,
    EPS: tl.constexpr,
    GUIDED: tl.constexpr,
    UNDO: tl.constexpr,
    MIXES: tl.constexpr,
    TARGET_FIRST: tl.constexpr,
    WORDS: tl.constexpr,
    LIMIT: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes `target +- rint(c source + b eps)`, and with MIXES the mixing after it."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    t = tl.load(target_ptr + offsets, mask=mask, other=0).to(tl.int64)
    s = tl.load(source_ptr + offsets, mask=mask, other=0).to(tl.int64)
    outside = mask & False
    v = s.to(tl.float64) * tl.full((), c, tl.float64)
    if EPS:
        v = v + _network(eps_ptr, faults_ptr, n, row, offsets, mask, g, GUIDED) * tl.full((), b, tl.float64)
    t, outside = _moved(t, v, outside, UNDO, LIMIT)
    if MIXES:
        first, in0_ptr, out0_ptr = t, buffer_ptr, out_buffer_ptr
        second, in1_ptr, out1_ptr = s, source_buffer_ptr, out_source_buffer_ptr
        if not TARGET_FIRST:
            first, in0_ptr, out0_ptr = s, source_buffer_ptr, out_source_buffer_ptr
            second, in1_ptr, out1_ptr = t, buffer_ptr, out_buffer_ptr
        first, outside = _mixed(
            first,
            second,
            outside,
            in0_ptr,
            out0_ptr,
            n,
            offsets,
            mask,
            by0,
            over0,
            c0,
            UNDO,
            WORDS,
            LIMIT,
            DIGITS,
        )
        second, outside = _mixed(
            second,
            first,
            outside,
            in1_ptr,
            out1_ptr,
            n,
            offsets,
            mask,
            by1,
            over1,
            c1,
            UNDO,
            WORDS,
            LIMIT,
            DIGITS,
        )
        t, s = first, second
        if not TARGET_FIRST:
            t, s = second, first
        tl.store(out_source_ptr + offsets, s.to(out_source_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offsets, t.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(faults_ptr + 2 * row, 1, mask=tl.max(outside.to(tl.int32), 0) > 0)
