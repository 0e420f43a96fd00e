"""Quick GELU as a layer of a frozen network: the layer itself, and the gradient of its input alone.

    y = x sigmoid(1.702 x)

It is the approximation of GELU by a sigmoid (arXiv 1606.08415) that OpenAI's CLIP has (arXiv 2103.00020). PyTorch
computes it by three operators and its gradient by six, and keeps x and the sigmoid for a backward pass. These ops make
one pass each, and need x alone.

Arithmetic: that of PyTorch's operators, each of which rounds its result to x's dtype:

    z = 1.702 x,  s = sigmoid(z),  y = x s
    a = grad_y s,  t = grad_y x,  b = t (1 - s) s,  c = 1.702 b,  grad_x = a + c

Inside an operator, numbers have float64 for float64, else float32. The eager kernels are PyTorch's operators. Those of
other backends may have other exponential functions, so that backends agree up to rounding, unlike those of the ops on
latents. PyTorch's operator for b rounds after each of its three operations in float16, and on GPUs also in bfloat16;
Triton's kernels round once. On an x86-64 CPU the native kernels give PyTorch's bits in float32, bfloat16 and float16
(`matches_torch("quick_gelu")` finds out whether they do).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.registry import eager, select
from .layout import check_floating, check_same
from .matching import compared
from .registration import register, registered
from .signatures import QUICK_GELU, QUICK_GELU_BACKWARD
from .transforms import is_plain, is_transformed, needs_formula

FACTOR = 1.702
"""What x is multiplied by in the argument of the sigmoid."""

_sigmoid_backward = torch.ops.aten.sigmoid_backward

# The public functions


def quick_gelu(x: Tensor) -> Tensor:
    """Computes `x * sigmoid(1.702 * x)` in one op.

    Args:
        x: A tensor of any shape in float16, bfloat16, float32 or float64. Contiguous tensors are used in place.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        TypeError: x has another dtype.

    Example:
        >>> y = ops.quick_gelu(mlp.fc1(x))  # the activation of OpenAI's CLIP
    """
    if is_plain(x):
        return _forward(x)
    if is_transformed(x):
        return _formula(QUICK_GELU.call(x))
    result: Tensor = registered.quick_gelu(x)
    return result


def quick_gelu_backward(grad_y: Tensor, x: Tensor) -> Tensor:
    """Computes the gradient of the input of `quick_gelu`.

    Args:
        grad_y: The gradient of y, a tensor of x's shape and dtype.
        x: The input of `quick_gelu`.

    Returns:
        The gradient of x, a contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: Shapes or devices do not fit together.
        TypeError: A dtype does not fit.
    """
    if is_plain(grad_y, x):
        return _backward(grad_y, x)
    if needs_formula(grad_y, x):
        return _backward_formula(QUICK_GELU_BACKWARD.call(grad_y, x))
    result: Tensor = registered.quick_gelu_backward(grad_y, x)
    return result


@compared("quick_gelu")
def _same_bits() -> bool:
    """Whether values and gradients have the bits of PyTorch's operators for a few tensors in three dtypes."""
    generator = torch.Generator().manual_seed(0)
    # Odd sizes end in the middle of PyTorch's vectors. Of the large ones each of its threads has a part.
    for size in (5, 192, 2077, 70_003, 150_001):
        draws = torch.randn(2, size, generator=generator, device="cpu")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, grad = draws[0].mul(3).to(dtype), draws[1].to(dtype)
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                want = leaf * torch.sigmoid(FACTOR * leaf)
                (want_grad,) = torch.autograd.grad(want, leaf, grad)
            if not (torch.equal(_forward(x), want) and torch.equal(_backward(grad, x), want_grad)):
                return False
    return True


# From tensors of any layout to a backend's kernel


def _output(call: Any) -> Tensor:
    """Checks the operand and returns an uninitialised tensor for y."""
    check_floating(x=call.x)
    result: Tensor = call.x.new_empty(call.x.shape)
    return result


def _forward(x: Tensor) -> Tensor:
    """Checks the operand, makes it contiguous and calls the backend's kernel."""
    out = _output(QUICK_GELU.call(x))
    if out.numel():
        select("quick_gelu", x)(out, x.contiguous())
    return out


def _backward_output(call: Any) -> Tensor:
    """Checks the operands and returns an uninitialised tensor for the gradient of x."""
    out = _output(call)
    check_same("x", call.x, grad_y=call.grad_y)
    return out


def _backward(grad_y: Tensor, x: Tensor) -> Tensor:
    """Checks the operands, makes them contiguous and calls the backend's kernel."""
    out = _backward_output(QUICK_GELU_BACKWARD.call(grad_y, x))
    if out.numel():
        select("quick_gelu_backward", x)(out, grad_y.contiguous(), x.contiguous())
    return out


# PyTorch's operators, which the eager kernels and the formulas share


def _parts(grad_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the two parts of the gradient: by way of the factor x, and by way of the sigmoid."""
    sigmoid = torch.sigmoid(FACTOR * x)
    return grad_y * sigmoid, _sigmoid_backward(grad_y * x, sigmoid) * FACTOR


def _formula(call: Any) -> Tensor:
    """Returns y by operations that can be transformed and differentiated in any mode."""
    check_floating(x=call.x)
    result: Tensor = call.x * torch.sigmoid(FACTOR * call.x)
    return result


def _backward_formula(call: Any) -> Tensor:
    """Returns the gradient of x by operations that can be transformed and differentiated in any mode."""
    check_floating(x=call.x)
    check_same("x", call.x, grad_y=call.grad_y)
    return torch.add(*_parts(*call))


# The eager kernels


@eager(QUICK_GELU)
def _eager(call: Any) -> None:
    """Fills y."""
    torch.mul(call.x, torch.sigmoid(FACTOR * call.x), out=call.y)


@eager(QUICK_GELU_BACKWARD)
def _backward_eager(call: Any) -> None:
    """Fills grad_x."""
    torch.add(*_parts(call.grad_y, call.x), out=call.grad_x)


# Gradient and registration


def _remember(ctx: Any, call: Any, _: Tensor) -> None:
    """Keeps what the backward pass needs."""
    ctx.save_for_backward(call.x)


def _gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor]:
    """Returns the gradient of x."""
    (x,) = ctx.saved_tensors
    return (quick_gelu_backward(grad_y, x),)


register(QUICK_GELU, _forward, _output, remember=_remember, gradient=_gradient)
register(QUICK_GELU_BACKWARD, _backward, _backward_output)
