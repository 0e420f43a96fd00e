"""The Triton kernels of LayerNorm and RMSNorm with a modulation: the layer, and the gradient of its input.

A program computes a few whole rows, so that x is read from memory once. ROWS x BLOCK elements are in its registers.
"""

# This file has no `from __future__ import annotations`, because Triton reads the types of arguments from annotations.

import triton
import triton.language as tl

from .triton_kernels import _load, _store


@triton.jit
def _rows(rows, channels, tokens, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns this program's rows, the places of their elements, the channels, where a sample's vectors are, and masks.

    tokens: How many rows a sample has.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)[None, :]
    there = row < rows
    mask = there[:, None] & (channel < channels)
    place = row.to(tl.int64)[:, None] * channels + channel
    of_sample = (row // tokens).to(tl.int64)[:, None] * channels + channel
    return row, place, channel, of_sample, there, mask


@triton.jit
def modulated_norm_kernel(
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    rows,
    channels,
    tokens,
    eps: tl.float64,
    COMPUTE: tl.constexpr,
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the statistics of some rows, and y."""
    row, place, channel, of_sample, there, mask = _rows(rows, channels, tokens, ROWS, BLOCK)
    x = _load(x_ptr, place, mask, COMPUTE)
    size = tl.full((), channels, COMPUTE)
    mean = tl.sum(x, 1) / size
    away = x
    if CENTER:
        away = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(away * away, 1) / size + tl.full((), eps, COMPUTE))
    y = away * rstd[:, None]
    if WEIGHT:
        y = y * _load(weight_ptr, channel, channel < channels, COMPUTE)
    if BIAS:
        y = y + _load(bias_ptr, channel, channel < channels, COMPUTE)
    if SCALE:
        y = y * (1.0 + _load(scale_ptr, of_sample, mask, COMPUTE))
    if SHIFT:
        y = y + _load(shift_ptr, of_sample, mask, COMPUTE)
    _store(y_ptr, place, y, mask)
    tl.store(rstd_ptr + row, rstd, mask=there)
    if CENTER:
        tl.store(mean_ptr + row, mean, mask=there)


@triton.jit
def modulated_norm_backward_kernel(
    out_ptr,
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    scale_ptr,
    rows,
    channels,
    tokens,
    COMPUTE: tl.constexpr,
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the gradient of some rows of x."""
    row, place, channel, of_sample, there, mask = _rows(rows, channels, tokens, ROWS, BLOCK)
    rstd = tl.load(rstd_ptr + row, mask=there, other=0.0)
    normalised = _load(x_ptr, place, mask, COMPUTE)
    if CENTER:
        mean = tl.load(mean_ptr + row, mask=there, other=0.0)
        normalised = tl.where(mask, normalised - mean[:, None], 0.0)
    normalised = normalised * rstd[:, None]
    grad = _load(grad_ptr, place, mask, COMPUTE)
    if SCALE:
        grad = grad * (1.0 + _load(scale_ptr, of_sample, mask, COMPUTE))
    if WEIGHT:
        grad = grad * _load(weight_ptr, channel, channel < channels, COMPUTE)
    size = tl.full((), channels, COMPUTE)
    result = grad - normalised * (tl.sum(grad * normalised, 1) / size)[:, None]
    if CENTER:
        result = result - (tl.sum(grad, 1) / size)[:, None]
    _store(out_ptr, place, result * rstd[:, None], mask)
