"""The Triton kernels of layers of frozen networks: GroupNorm with SiLU after it, and the gradient of its input.

A group of channels of one sample is read in several parts, so that a GPU has enough work where groups are few and
large. The first of two kernels writes what it has found in each part, and the second puts the parts together in a fixed
order. So a result does not depend on the order in which a GPU runs them.
"""

# This file has no `from __future__ import annotations`, because Triton reads the types of arguments from annotations.

import triton
import triton.language as tl

from .triton_kernels import _load, _store


@triton.jit
def _places(element, group, size, pixels, channels, groups, per_group, CHANNELS_LAST: tl.constexpr):
    """Returns where the elements of a group are in memory, and in which channels.

    Elements are counted in the order of memory. group: the number of the group among all groups of all samples.
    """
    first = (group % groups) * per_group
    if CHANNELS_LAST:
        pixel = element // per_group
        channel = first + element - pixel * per_group
        sample = (group // groups).to(tl.int64)
        return (sample * pixels + pixel) * channels + channel, channel
    return group.to(tl.int64) * size + element, first + element // pixels


@triton.jit
def _counts(size, per_part, PARTS: tl.constexpr):
    """Returns how many elements each part of a group has."""
    return tl.minimum(tl.maximum(size - tl.arange(0, PARTS) * per_part, 0), per_part)


@triton.jit
def _argument(x, mean, rstd, weight_ptr, bias_ptr, channel, mask, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """Returns x normalised, and the argument of SiLU."""
    normalised = (x - mean) * rstd
    z = normalised
    if WEIGHT:
        z = z * _load(weight_ptr, channel, mask, x.dtype)
    if BIAS:
        z = z + _load(bias_ptr, channel, mask, x.dtype)
    return normalised, z


@triton.jit
def group_moments_kernel(
    parts_ptr,
    x_ptr,
    size,
    pixels,
    channels,
    groups,
    per_group,
    per_part,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a part's mean, and the sum of its squared differences from that: parts (2, groups, PARTS)."""
    group, part = tl.program_id(0), tl.program_id(1)
    begin = part * per_part
    end = tl.minimum(begin + per_part, size)
    count = tl.maximum(end - begin, 1).to(COMPUTE)
    # The differences from the mean of the first block are summed up, so that the squares lose no digits.
    element = begin + tl.arange(0, BLOCK)
    mask = element < end
    place, _ = _places(element, group, size, pixels, channels, groups, per_group, CHANNELS_LAST)
    near = tl.sum(_load(x_ptr, place, mask, COMPUTE), 0) / tl.minimum(count, BLOCK)
    total = tl.zeros((BLOCK,), COMPUTE)
    squares = tl.zeros((BLOCK,), COMPUTE)
    for start in range(begin, end, BLOCK):
        element = start + tl.arange(0, BLOCK)
        mask = element < end
        place, _ = _places(element, group, size, pixels, channels, groups, per_group, CHANNELS_LAST)
        difference = tl.where(mask, _load(x_ptr, place, mask, COMPUTE) - near, 0.0)
        total = total + difference
        squares = squares + difference * difference
    whole = tl.sum(total, 0)
    at = group * PARTS + part
    tl.store(parts_ptr + at, near + whole / count)
    tl.store(parts_ptr + tl.num_programs(0) * PARTS + at, tl.sum(squares, 0) - whole * whole / count)


@triton.jit
def group_norm_kernel(
    y_ptr,
    mean_ptr,
    rstd_ptr,
    parts_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    size,
    pixels,
    channels,
    groups,
    per_group,
    per_part,
    eps: tl.float64,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Puts the moments of the parts together, and writes a block of y."""
    group, block = tl.program_id(0), tl.program_id(1)
    at = group * PARTS + tl.arange(0, PARTS)
    counts = _counts(size, per_part, PARTS).to(COMPUTE)
    means = tl.load(parts_ptr + at)
    squares = tl.load(parts_ptr + tl.num_programs(0) * PARTS + at)
    whole = tl.full((), size, COMPUTE)
    mean = tl.sum(means * counts, 0) / whole
    variance = tl.sum(squares + counts * (means - mean) * (means - mean), 0) / whole
    rstd = 1.0 / tl.sqrt(variance + tl.full((), eps, COMPUTE))
    if block == 0:
        tl.store(mean_ptr + group, mean)
        tl.store(rstd_ptr + group, rstd)
    element = block * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    place, channel = _places(element, group, size, pixels, channels, groups, per_group, CHANNELS_LAST)
    x = _load(x_ptr, place, mask, COMPUTE)
    _, z = _argument(x, mean, rstd, weight_ptr, bias_ptr, channel, mask, WEIGHT, BIAS)
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    _store(y_ptr, place, z, mask)


@triton.jit
def _gradient(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    place,
    channel,
    mask,
    mean,
    rstd,
    COMPUTE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Returns the gradient of the normalised x, and the normalised x."""
    grad = _load(grad_ptr, place, mask, COMPUTE)
    x = _load(x_ptr, place, mask, COMPUTE)
    normalised, z = _argument(x, mean, rstd, weight_ptr, bias_ptr, channel, mask, WEIGHT, BIAS)
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        grad = grad * sigmoid * (1.0 + z * (1.0 - sigmoid))
    if WEIGHT:
        grad = grad * _load(weight_ptr, channel, mask, COMPUTE)
    return grad, normalised


@triton.jit
def group_norm_backward_sums_kernel(
    parts_ptr,
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    size,
    pixels,
    channels,
    groups,
    per_group,
    per_part,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a part's sums of the gradient, and of its product with the normalised x: parts (2, groups, PARTS)."""
    group, part = tl.program_id(0), tl.program_id(1)
    begin = part * per_part
    end = tl.minimum(begin + per_part, size)
    mean, rstd = tl.load(mean_ptr + group), tl.load(rstd_ptr + group)
    total = tl.zeros((BLOCK,), COMPUTE)
    product = tl.zeros((BLOCK,), COMPUTE)
    for start in range(begin, end, BLOCK):
        element = start + tl.arange(0, BLOCK)
        mask = element < end
        place, channel = _places(element, group, size, pixels, channels, groups, per_group, CHANNELS_LAST)
        grad, normalised = _gradient(
            grad_ptr, x_ptr, weight_ptr, bias_ptr, place, channel, mask, mean, rstd, COMPUTE, WEIGHT, BIAS, SILU
        )
        total = total + tl.where(mask, grad, 0.0)
        product = product + tl.where(mask, grad * normalised, 0.0)
    at = group * PARTS + part
    tl.store(parts_ptr + at, tl.sum(total, 0))
    tl.store(parts_ptr + tl.num_programs(0) * PARTS + at, tl.sum(product, 0))


@triton.jit
def group_norm_backward_kernel(
    out_ptr,
    parts_ptr,
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    size,
    pixels,
    channels,
    groups,
    per_group,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the sums of the parts, and writes a block of the gradient of x."""
    group, block = tl.program_id(0), tl.program_id(1)
    at = group * PARTS + tl.arange(0, PARTS)
    whole = tl.full((), size, COMPUTE)
    total = tl.sum(tl.load(parts_ptr + at), 0) / whole
    product = tl.sum(tl.load(parts_ptr + tl.num_programs(0) * PARTS + at), 0) / whole
    mean, rstd = tl.load(mean_ptr + group), tl.load(rstd_ptr + group)
    element = block * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    place, channel = _places(element, group, size, pixels, channels, groups, per_group, CHANNELS_LAST)
    grad, normalised = _gradient(
        grad_ptr, x_ptr, weight_ptr, bias_ptr, place, channel, mask, mean, rstd, COMPUTE, WEIGHT, BIAS, SILU
    )
    _store(out_ptr, place, (grad - total - normalised * product) * rstd, mask)
