"""Convolutions with frozen weights, whose graph keeps the weights and a shape.

PyTorch's own convolution saves its input, which the weights' gradient alone needs (pytorch#133566; memsave_torch,
Bhatia and Dangel, arXiv 2404.12406).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """The arguments of a convolution, as `torch.convolution` takes them after the bias."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


class _Convolution(torch.autograd.Function):
    """A convolution that saves no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        ctx.strides = None if x.is_contiguous() else x.stride()
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        # PyTorch asks for an input of the right shape, and for its strides, but does not read it.
        if ctx.strides is None:
            like = weight.new_empty(()).expand(ctx.shape)
        else:
            like = weight.new_empty_strided(ctx.shape, ctx.strides)
        gradient = torch.ops.aten.convolution_backward(
            grad_outputs[0], like, weight, None, *ctx.geometry, [True, False, False]
        )
        return gradient[0], None, None, None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolves x with weights that want no gradient.

    Args:
        x: The input (B, C, ...), of one to three dimensions in space.
        weight: The weights, in x's dtype.
        bias: One number for each channel of the output, or None.
        geometry: Stride, padding and so on.
    """
    result: Tensor = _Convolution.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return result
