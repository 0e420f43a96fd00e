"""Gated activations as layers of a frozen network: the layer itself, and the gradient of its input alone.

    hidden, gate     the first and the second half of the last dimension of x
    y = hidden act(gate)

act is GELU (the layer is then called GEGLU), GELU in the form with a hyperbolic tangent, or SiLU (SwiGLU). PyTorch
keeps hidden, gate and act(gate) for a backward pass. These ops need x alone: the backward pass computes act(gate)
again, and writes both halves of the gradient in one pass. Gated activations are arXiv 2002.05202, GELU arXiv
1606.08415; keeping nothing else is the idea of memsave_torch (arXiv 2404.12406) and of Liger-Kernel's GEGLU.

Arithmetic: it is done in float64 for float64, else in float32. act(gate), grad_y hidden and the results are rounded to
x's dtype, as by PyTorch's layers, which write each of them to memory. Backends agree up to rounding, unlike those of
the ops on latents. On an x86-64 CPU the native kernels give the bits of PyTorch's own kernels for float32, bfloat16 and
float16 tensors of several rows, with GELU and with SiLU (`matches_torch("gated_activation")` finds out whether they
do).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends.registry import eager, select
from .layout import check_floating, compute_dtype, store
from .matching import compared
from .registration import register, registered
from .signatures import GATED_ACTIVATION, GATED_ACTIVATION_BACKWARD
from .transforms import cast, is_plain, is_transformed, needs_formula

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
"""The activations by the numbers that the registered ops and the kernels take for them."""

# The public functions


def gated_activation(x: Tensor, activation: str = "gelu") -> Tensor:
    """Computes `hidden * act(gate)` in one op, where hidden and gate are the halves of x's last dimension.

    Args:
        x: A tensor (..., 2 n) in float16, bfloat16, float32 or float64. Contiguous tensors are used in place.
        activation: "gelu", "gelu_tanh" (the form with a hyperbolic tangent) or "silu".

    Returns:
        A contiguous tensor (..., n) of x's dtype.

    Raises:
        ValueError: x has no dimension or an odd last one, or there is no such activation.
        TypeError: x has another dtype.

    Example:
        >>> y = ops.gated_activation(layer.proj(x), "gelu")  # GEGLU
    """
    kind = _kind(activation)
    if is_plain(x):
        return _forward(x, kind)
    if is_transformed(x):
        return _formula(GATED_ACTIVATION.call(x, kind))
    result: Tensor = registered.gated_activation(x, kind)
    return result


def gated_activation_backward(grad_y: Tensor, x: Tensor, activation: str = "gelu") -> Tensor:
    """Computes the gradient of the input of `gated_activation`.

    Args:
        grad_y: The gradient of y, a tensor (..., n) of x's dtype.
        x: The input (..., 2 n) of `gated_activation`.
        activation: As in `gated_activation`.

    Returns:
        The gradient of x, a contiguous tensor (..., 2 n) of x's dtype.

    Raises:
        ValueError: Shapes or devices do not fit together, or there is no such activation.
        TypeError: A dtype does not fit.
    """
    kind = _kind(activation)
    if is_plain(grad_y, x):
        return _backward(grad_y, x, kind)
    if needs_formula(grad_y, x):
        return _backward_formula(GATED_ACTIVATION_BACKWARD.call(grad_y, x, kind))
    result: Tensor = registered.gated_activation_backward(grad_y, x, kind)
    return result


@compared("gated_activation")
def _same_bits() -> bool:
    """Whether values and gradients have the bits of PyTorch's kernels for a few tensors, with GELU and with SiLU."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # Odd sizes end in the middle of PyTorch's vectors, and in the middle of a row where its threads divide a tensor.
    for rows, half in ((3, 64), (7, 37), (501, 35), (1009, 37)):
        draws = [torch.randn(rows, size, generator=generator, device="cpu") for size in (2 * half, half)]
        for dtype, kind in itertools.product(dtypes, (0, 2)):
            x, grad = draws[0].mul(3).to(dtype), draws[1].to(dtype)
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                hidden, gate = leaf.chunk(2, -1)
                want = hidden * _FUNCTIONS[kind][0](gate)
                (want_grad,) = torch.autograd.grad(want, leaf, grad)
            if not (torch.equal(_forward(x, kind), want) and torch.equal(_backward(grad, x, kind), want_grad)):
                return False
    return True


# From tensors of any layout to a backend's kernel


def _kind(activation: str) -> int:
    """Returns the number of an activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    return ACTIVATIONS.index(activation)


def _shape(x: Tensor) -> tuple[int, ...]:
    """Checks the operand and returns y's shape."""
    check_floating(x=x)
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"x: expected a tensor (..., 2 n) of two halves, got the shape {tuple(x.shape)}")
    return (*x.shape[:-1], x.shape[-1] // 2)


def _output(call: Any) -> Tensor:
    """Checks the operand and returns an uninitialised tensor for y."""
    result: Tensor = call.x.new_empty(_shape(call.x))
    return result


def _forward(x: Tensor, activation: int) -> Tensor:
    """Checks the operand, makes it contiguous and calls the backend's kernel."""
    out = _output(GATED_ACTIVATION.call(x, activation))
    if out.numel():
        select("gated_activation", x)(out, x.contiguous(), activation)
    return out


def _backward_output(call: Any) -> Tensor:
    """Checks the operands and returns an uninitialised tensor for the gradient of x."""
    grad_y, x = call.grad_y, call.x
    shape = _shape(x)
    if grad_y.shape != shape:
        raise ValueError(f"grad_y: expected the shape {shape} of a half of x, got {tuple(grad_y.shape)}")
    if grad_y.dtype != x.dtype:
        raise TypeError(f"grad_y: expected x's dtype {x.dtype}, got {grad_y.dtype}")
    if grad_y.device != x.device:
        raise ValueError(f"grad_y: expected x's device {x.device}, got {grad_y.device}")
    result: Tensor = x.new_empty(x.shape)
    return result


def _backward(grad_y: Tensor, x: Tensor, activation: int) -> Tensor:
    """Checks the operands, makes them contiguous and calls the backend's kernel."""
    out = _backward_output(GATED_ACTIVATION_BACKWARD.call(grad_y, x, activation))
    if out.numel():
        select("gated_activation_backward", x)(out, grad_y.contiguous(), x.contiguous(), activation)
    return out


# The arithmetic in plain torch operations, which the eager kernels and the formulas share


def _gelu_tanh(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _gelu_slope(gate: Tensor) -> Tensor:
    share = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
    return share + gate * (torch.exp(-0.5 * gate * gate) * (1 / math.sqrt(2 * math.pi)))


def _gelu_tanh_slope(gate: Tensor) -> Tensor:
    slope, cubic = math.sqrt(8 / math.pi), 0.044715
    sigmoid = torch.sigmoid(slope * gate * (1 + cubic * gate * gate))
    return sigmoid + gate * sigmoid * (1 - sigmoid) * slope * (1 + 3 * cubic * gate * gate)


def _silu_slope(gate: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(gate)
    return sigmoid * (1 + gate * (1 - sigmoid))


_FUNCTIONS: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
    (F.gelu, _gelu_slope),
    (_gelu_tanh, _gelu_tanh_slope),
    (F.silu, _silu_slope),
)
"""Each activation and its derivative."""


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """Returns hidden and gate in the dtype of the arithmetic."""
    return x.to(compute_dtype(x.dtype)).chunk(2, -1)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a value rounded to a dtype, in its own."""
    return cast(value, dtype).to(value.dtype)


def _product(call: Any) -> Tensor:
    """Returns y in the dtype of the arithmetic."""
    hidden, gate = _halves(call.x)
    return hidden * _rounded(_FUNCTIONS[call.activation][0](gate), call.x.dtype)


def _gradients(call: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of hidden and of gate in the dtype of the arithmetic."""
    hidden, gate = _halves(call.x)
    value, slope = _FUNCTIONS[call.activation]
    grad = call.grad_y.to(hidden.dtype)
    return grad * _rounded(value(gate), call.x.dtype), _rounded(grad * hidden, call.x.dtype) * slope(gate)


def _formula(call: Any) -> Tensor:
    """Returns y by operations that can be transformed and differentiated in any mode."""
    _output(call)
    return cast(_product(call), call.x.dtype)


def _backward_formula(call: Any) -> Tensor:
    """Returns the gradient of x by operations that can be transformed and differentiated in any mode."""
    _backward_output(call)
    return cast(torch.cat(_gradients(call), -1), call.x.dtype)


# The eager kernels


@eager(GATED_ACTIVATION)
def _eager(call: Any) -> None:
    """Fills y."""
    store(call.y, _product(call))


@eager(GATED_ACTIVATION_BACKWARD)
def _backward_eager(call: Any) -> None:
    """Fills grad_x."""
    for out, value in zip(call.grad_x.chunk(2, -1), _gradients(call), strict=True):
        store(out, value)


# Gradient and registration


def _remember(ctx: Any, call: Any, _: Tensor) -> None:
    """Keeps what the backward pass needs."""
    ctx.save_for_backward(call.x)
    ctx.activation = ACTIVATIONS[call.activation]


def _gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor]:
    """Returns the gradient of x."""
    (x,) = ctx.saved_tensors
    return (gated_activation_backward(grad_y, x, ctx.activation),)


register(GATED_ACTIVATION, _forward, _output, remember=_remember, gradient=_gradient)
register(GATED_ACTIVATION_BACKWARD, _backward, _backward_output)
