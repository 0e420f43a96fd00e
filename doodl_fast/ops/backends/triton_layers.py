"""Launches the Triton kernels of layers of frozen networks, as `triton.py` does those of the ops on latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import signatures
from .triton_launch import BLOCK, arithmetic, blocks, launch, warps_for

LARGEST_PARTS = 128


def _parts(groups: int, size: int) -> int:
    """Returns in how many parts each group is read: a power of two that gives a GPU some 512 programs, if it can."""
    parts = 1
    while 2 * parts * groups <= 512 and 2 * parts <= min(blocks(size), LARGEST_PARTS):
        parts *= 2
    return parts


class _Shape:
    """The numbers that the kernels of GroupNorm take for a tensor x."""

    def __init__(self, x: Tensor, num_groups: int) -> None:
        channels = x.shape[1]
        per_group, pixels = channels // num_groups, x.numel() // (x.shape[0] * channels)
        size = per_group * pixels
        self.groups, self.parts = x.shape[0] * num_groups, _parts(x.shape[0] * num_groups, size)
        self.numbers = (size, pixels, channels, num_groups, per_group)
        self.per_part = blocks(-(-size // self.parts)) * BLOCK
        self.over_parts, self.over_blocks = (self.groups, self.parts), (self.groups, blocks(size))
        self.constants = {**arithmetic(x), "CHANNELS_LAST": not x.is_contiguous(), "PARTS": self.parts}

    def found(self, like: Tensor) -> Tensor:
        """Returns memory for the two numbers that are found in each part of each group."""
        return like.new_empty(2, self.groups, self.parts)


def _weights(call: Any) -> dict[str, bool]:
    return {"WEIGHT": call.weight is not None, "BIAS": call.bias is not None, "SILU": call.silu}


def _group_norm_silu(call: Any) -> None:
    """Launches `group_norm_silu`."""
    shape = _Shape(call.x, call.num_groups)
    parts = shape.found(call.mean)
    launch(
        "group_moments_kernel",
        shape.over_parts,
        call.x,
        *(parts, call.x, *shape.numbers, shape.per_part),
        **shape.constants,
    )
    launch(
        "group_norm_kernel",
        shape.over_blocks,
        call.x,
        *(call.y, call.mean, call.rstd, parts, call.x, call.weight, call.bias),
        *(*shape.numbers, shape.per_part, float(call.eps)),
        **shape.constants,
        **_weights(call),
    )


def _group_norm_silu_backward(call: Any) -> None:
    """Launches `group_norm_silu_backward`."""
    shape = _Shape(call.x, call.num_groups)
    parts = shape.found(call.mean)
    tensors = (call.grad_y, call.x, call.mean, call.rstd, call.weight, call.bias)
    launch(
        "group_norm_backward_sums_kernel",
        shape.over_parts,
        call.x,
        *(parts, *tensors, *shape.numbers, shape.per_part),
        **shape.constants,
        **_weights(call),
    )
    launch(
        "group_norm_backward_kernel",
        shape.over_blocks,
        call.x,
        *(call.grad_x, parts, *tensors, *shape.numbers),
        **shape.constants,
        **_weights(call),
    )


def _gated(name: str, call: Any, *tensors: Tensor) -> None:
    """Launches a kernel of a gated activation on each block of each row."""
    half = call.x.shape[-1] // 2
    block = min(BLOCK, 1 << (half - 1).bit_length())
    grid = (call.x.numel() // (2 * half), -(-half // block))
    launch(name, grid, call.x, *tensors, half, block=block, **arithmetic(call.x), ACTIVATION=call.activation)


def _gated_activation(call: Any) -> None:
    """Launches `gated_activation`."""
    _gated("gated_kernel", call, call.y, call.x)


def _gated_activation_backward(call: Any) -> None:
    """Launches `gated_activation_backward`."""
    _gated("gated_backward_kernel", call, call.grad_x, call.grad_y, call.x)


def _over_rows(name: str, x: Tensor, tensors: tuple[Any, ...], *numbers: float, **constants: Any) -> None:
    """Launches a kernel of a norm of the last dimension on a few rows each, which fit into the registers of a block."""
    channels = x.shape[-1]
    rows, block = x.numel() // channels, 1 << (channels - 1).bit_length()
    each = max(1, BLOCK // block)
    sizes = (rows, channels, rows // x.shape[0])
    launch(
        name,
        (-(-rows // each),),
        x,
        *(*tensors, *sizes, *numbers),
        block=block,
        warps=warps_for(each * block),
        **arithmetic(x),
        **constants,
        ROWS=each,
    )


def _modulated_norm(call: Any) -> None:
    """Launches `modulated_norm`."""
    vectors = (call.weight, call.bias, call.scale, call.shift)
    there = dict(zip(("WEIGHT", "BIAS", "SCALE", "SHIFT"), (z is not None for z in vectors), strict=True))
    tensors = (call.y, call.mean, call.rstd, call.x, *vectors)
    _over_rows("modulated_norm_kernel", call.x, tensors, float(call.eps), CENTER=call.center, **there)


def _modulated_norm_backward(call: Any) -> None:
    """Launches `modulated_norm_backward`."""
    tensors = (call.grad_x, call.grad_y, call.x, call.mean, call.rstd, call.weight, call.scale)
    there = {"WEIGHT": call.weight is not None, "SCALE": call.scale is not None}
    _over_rows("modulated_norm_backward_kernel", call.x, tensors, CENTER=call.center, **there)


def _rotary(name: str, call: Any, y: Tensor, x: Tensor) -> None:
    """Launches a kernel of rotary embeddings on each block of each token."""
    batch, tokens, heads, size = x.shape
    block = min(BLOCK, 1 << (heads * size - 1).bit_length())
    grid = (batch * tokens, -(-heads * size // block))
    tensors, own = (y, x, call.cos, call.sin), call.cos.ndim == 3
    constants = {**arithmetic(x), "HALVES": call.pairs == 1}
    launch(name, grid, x, *tensors, batch * tokens if own else tokens, heads, size, block=block, **constants)


def _rotary_embedding(call: Any) -> None:
    """Launches `rotary_embedding`."""
    _rotary("rotary_kernel", call, call.y, call.x)


def _rotary_embedding_backward(call: Any) -> None:
    """Launches `rotary_embedding_backward`."""
    _rotary("rotary_backward_kernel", call, call.grad_x, call.grad_y)


def _quick_gelu(call: Any) -> None:
    """Launches `quick_gelu`."""
    n = call.x.numel()
    launch("quick_gelu_kernel", (blocks(n),), call.x, call.y, call.x, n, **arithmetic(call.x))


def _quick_gelu_backward(call: Any) -> None:
    """Launches `quick_gelu_backward`."""
    n, tensors = call.x.numel(), (call.grad_x, call.grad_y, call.x)
    launch("quick_gelu_backward_kernel", (blocks(n),), call.x, *tensors, n, **arithmetic(call.x))


KERNELS = (
    (signatures.GROUP_NORM_SILU, _group_norm_silu),
    (signatures.GROUP_NORM_SILU_BACKWARD, _group_norm_silu_backward),
    (signatures.GATED_ACTIVATION, _gated_activation),
    (signatures.GATED_ACTIVATION_BACKWARD, _gated_activation_backward),
    (signatures.MODULATED_NORM, _modulated_norm),
    (signatures.MODULATED_NORM_BACKWARD, _modulated_norm_backward),
    (signatures.ROTARY_EMBEDDING, _rotary_embedding),
    (signatures.ROTARY_EMBEDDING_BACKWARD, _rotary_embedding_backward),
    (signatures.QUICK_GELU, _quick_gelu),
    (signatures.QUICK_GELU_BACKWARD, _quick_gelu_backward),
)
