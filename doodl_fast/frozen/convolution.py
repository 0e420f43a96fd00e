"""Convolutions with frozen weights, whose graph keeps the weights and a shape.

PyTorch's own convolution saves its input, which the weights' gradient alone needs (pytorch#133566; memsave_torch,
Bhatia and Dangel, arXiv 2404.12406).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Geometry(NamedTuple):
    """The arguments of a convolution, as `torch.convolution` takes them after the bias."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


class _Saved:
    """What the graph of one convolution keeps: the weights, and in place of the input its shape.

    PyTorch's own node of the graph is used, with hooks for what it saves: a `torch.autograd.Function` would take
    several times as long beside a small convolution.
    """

    __slots__ = ("shape", "strides", "version", "weight")

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.shape, self.strides = x.shape, None if x.is_contiguous() else x.stride()
        self.weight, self.version = weight, weight._version

    def pack(self, saved: Tensor) -> Tensor | None:
        """Keeps a tensor that the node saves, unless it is the input."""
        return saved if saved is self.weight or saved.shape != self.shape else None

    def unpack(self, packed: Tensor | None) -> Tensor:
        """The weights, or a tensor in place of the input: PyTorch looks at its shape and strides, not at its values.

        Raises:
            RuntimeError: The weights were changed in place after the forward pass.
        """
        if self.weight._version != self.version:  # With hooks PyTorch does not look.
            raise RuntimeError(
                "the weight of a convolution was modified by an inplace operation between the forward and the backward "
                f"pass: it is at version {self.weight._version}, expected version {self.version}"
            )
        if packed is not None:
            return packed
        if self.strides is not None:
            return self.weight.new_empty_strided(self.shape, self.strides)
        if self.weight.is_cpu:  # Its kernels would make a contiguous tensor of it, unseen by whoever counts memory.
            return self.weight.new_empty(self.shape)
        return self.weight.new_empty(()).expand(self.shape)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolves x with weights that want no gradient.

    Args:
        x: The input (B, C, ...), of one to three dimensions in space.
        weight: The weights, in x's dtype.
        bias: One number for each channel of the output, or None.
        geometry: Stride, padding and so on.
    """
    saved = _Saved(x, weight)
    with saved_tensors_hooks(saved.pack, saved.unpack):
        return torch.convolution(x, weight, bias, *geometry)
