"""LayerNorm or RMSNorm with a modulation after it, as a layer of a frozen network, and the gradient of its input alone.

    mean, rstd       of the last dimension of x; rstd = 1 / sqrt(variance + eps)
    y = ((x - mean) rstd weight + bias) (1 + scale) + shift

weight and bias belong to the channels, scale and shift to the channels of each sample; each may be left out. This is
the adaptive norm of diffusion transformers (DiT, arXiv 2212.09748). Without scale and shift it is LayerNorm (arXiv
1607.06450), and with `center=False`, where mean is zero, RMSNorm (arXiv 1910.07467). PyTorch reads and writes the
tensor for the norm, for the product and for the sum, and again for each in the backward pass; these ops do it once.
They need x, mean and rstd for the gradient.

Arithmetic: it is done in float64 for float64, else in float32; y and the gradient are rounded once to x's dtype, where
PyTorch rounds after the norm, the product and the sum. The order of the sums depends on the backend. So the backends
agree up to rounding, unlike those of the ops on latents. On an x86-64 CPU the native kernels give the bits of PyTorch's
LayerNorm, product and sum for float32 and a multiple of 8 channels (`matches_torch("modulated_norm")` finds out
whether they do).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends.registry import eager, select
from .layout import check_floating, check_same, compute_dtype, store
from .matching import compared
from .registration import register, registered
from .signatures import MODULATED_NORM, MODULATED_NORM_BACKWARD
from .transforms import cast, is_plain, is_transformed, needs_formula, wants_gradient

# The public functions


def modulated_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `norm(x) * (1 + scale) + shift` in one op. It is differentiable in x alone.

    Args:
        x: The input (B, ..., C) in float16, bfloat16, float32 or float64. Contiguous tensors are used in place, and so
            are those whose dimensions but the first and the last are permuted.
        weight: The factor (C,) of each channel, or None.
        bias: The summand (C,) of each channel, or None.
        scale: What the norm's result is multiplied by, less one, (B, C), or None.
        shift: What is added then, (B, C), or None.
        eps: What is added to the variance.
        center: Whether the mean is subtracted, as in LayerNorm. Without it the norm is RMSNorm, whose variance is the
            mean of the squares.

    Returns:
        y of x's shape, dtype and layout; and mean and rstd (B, ...), in float64 for float64, else in float32. Mean
        has no elements, (0,), with `center=False`. Both are not differentiable. `modulated_norm_backward` takes them.

    Raises:
        ValueError: Shapes or devices do not fit together.
        TypeError: A dtype does not fit.
        RuntimeError: A gradient of weight, bias, scale or shift is wanted.

    Example:
        >>> y, mean, rstd = ops.modulated_norm(x, scale=scale, shift=shift)
        >>> grad_x = ops.modulated_norm_backward(grad_y, x, mean, rstd, scale=scale)
    """
    tensors = (x, weight, bias, scale, shift)
    if is_plain(*tensors):
        return _forward(*tensors, eps, center)
    if is_transformed(*tensors):
        return _formula(MODULATED_NORM.call(*tensors, eps, center))
    y, mean, rstd = registered.modulated_norm(*tensors, eps, center)
    return y, mean, rstd


def modulated_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    center: bool = True,
) -> Tensor:
    """Computes the gradient of the input of `modulated_norm`, and no other.

    Args:
        grad_y: The gradient of y, of x's shape and dtype.
        x: The input of `modulated_norm`.
        mean: The means that `modulated_norm` returned.
        rstd: The inverse standard deviations that `modulated_norm` returned.
        weight: As in `modulated_norm`.
        scale: As in `modulated_norm`.
        center: As in `modulated_norm`.

    Returns:
        The gradient of x, of x's shape, dtype and layout.

    Raises:
        ValueError: Shapes or devices do not fit together.
        TypeError: A dtype does not fit.
    """
    tensors = (grad_y, x, mean, rstd, weight, scale)
    if is_plain(*tensors):
        return _backward(*tensors, center)
    if needs_formula(*tensors):
        return _backward_formula(MODULATED_NORM_BACKWARD.call(*tensors, center))
    result: Tensor = registered.modulated_norm_backward(*tensors, center)
    return result


@compared("modulated_norm")
def _same_bits() -> bool:
    """Whether values and gradients of LayerNorm have the bits of PyTorch's kernels for a few tensors."""
    generator = torch.Generator().manual_seed(0)
    for channels in (16, 72, 384):
        x, grad = (torch.randn(2, 5, channels, generator=generator, device="cpu") for _ in range(2))
        weight, bias = torch.randn(2, channels, generator=generator, device="cpu")
        scale, shift = torch.randn(2, 2, channels, generator=generator, device="cpu")
        for w, b in ((None, None), (weight, bias)):
            with torch.enable_grad():
                leaf = (x + 0.5).requires_grad_()
                want = F.layer_norm(leaf, (channels,), w, b, 1e-6) * (1 + scale[:, None]) + shift[:, None]
                (want_grad,) = torch.autograd.grad(want, leaf, grad)
            y, mean, rstd = _forward(x + 0.5, w, b, scale, shift, 1e-6, True)
            if not (
                torch.equal(y, want) and torch.equal(_backward(grad, x + 0.5, mean, rstd, w, scale, True), want_grad)
            ):
                return False
    return True


# From tensors of any layout to a backend's kernel


def _check(x: Tensor, **vectors: Tensor | None) -> None:
    """Raises ValueError or TypeError, which names the argument, if the operands do not fit together."""
    check_floating(x=x, **vectors)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"x: expected a tensor (B, ..., C) with channels, got the shape {tuple(x.shape)}")
    channels = (x.shape[-1],)
    for name, tensor in vectors.items():
        if tensor is None:
            continue
        expected = (x.shape[0], *channels) if name in ("scale", "shift") else channels
        if tensor.shape != expected or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected the shape {expected} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}"
            )
        if tensor.dtype == torch.float64 != x.dtype:
            raise TypeError(f"{name}: expected at most float32 with x in {x.dtype}, got {tensor.dtype}")


def _check_statistics(x: Tensor, center: bool, **statistics: Tensor) -> None:
    """Raises ValueError or TypeError unless mean and rstd are what `modulated_norm` returns for x."""
    dtype = compute_dtype(x.dtype)
    for name, tensor in statistics.items():
        expected = x.shape[:-1] if center or name == "rstd" else (0,)
        if tensor.shape != expected or tensor.device != x.device:
            wanted = f"expected the shape {tuple(expected)} on {x.device}"
            raise ValueError(f"{name}: {wanted}, got {tuple(tensor.shape)} on {tensor.device}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} with x in {x.dtype}, got {tensor.dtype}")


def _order(x: Tensor) -> tuple[int, ...] | None:
    """Returns the order of the dimensions in which x is contiguous, with the first and the last in their places.

    None stands for the order that they have, in which x is used or copied.
    """
    if x.is_contiguous():
        return None
    inner = sorted(range(1, x.ndim - 1), key=x.stride, reverse=True)
    order = (0, *inner, x.ndim - 1)
    return order if x.permute(order).is_contiguous() else None


def _arranged(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """Returns a tensor in contiguous memory, with its dimensions in an order."""
    if order is not None:
        tensor = tensor.permute(order[: tensor.ndim])
    return tensor.contiguous()


def _like(x: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """Returns an uninitialised tensor of x's shape in the layout that the kernels use."""
    if order is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    made = x.new_empty([x.shape[i] for i in order])
    return made.permute(sorted(range(x.ndim), key=order.__getitem__))


def _outputs(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the operands and returns uninitialised tensors for y, mean and rstd."""
    x = call.x
    _check(x, weight=call.weight, bias=call.bias, scale=call.scale, shift=call.shift)
    rstd = x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))
    return _like(x, _order(x)), torch.empty_like(rstd) if call.center else rstd.new_empty(0), rstd


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the operands, brings x to a dense layout and calls the backend's kernel."""
    y, mean, rstd = _outputs(MODULATED_NORM.call(x, weight, bias, scale, shift, eps, center))
    if x.numel():
        order = _order(x)
        vectors = (None if z is None else z.contiguous() for z in (weight, bias, scale, shift))
        flat = (y if order is None else y.permute(order), *(z.view(-1) for z in (mean, rstd)))
        select("modulated_norm", x)(*flat, _arranged(x, order), *vectors, eps, center)
        if order is not None:  # The kernel has written the statistics in the order of memory.
            mean, rstd = (_in_order(z, order) for z in (mean, rstd))
    return y, mean, rstd


def _in_order(statistics: Tensor, order: tuple[int, ...]) -> Tensor:
    """Returns statistics whose memory has the dimensions in an order, with their own dimensions."""
    if statistics.ndim != len(order) - 1:
        return statistics
    inner = order[:-1]
    given = statistics.view([statistics.shape[i] for i in inner])
    return given.permute(sorted(range(len(inner)), key=inner.__getitem__)).contiguous()


def _backward_output(call: Any) -> Tensor:
    """Checks the operands and returns an uninitialised tensor for the gradient of x."""
    x = call.x
    _check(x, weight=call.weight, scale=call.scale)
    check_same("x", x, grad_y=call.grad_y)
    _check_statistics(x, call.center, mean=call.mean, rstd=call.rstd)
    return _like(x, _order(x))


def _backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    center: bool,
) -> Tensor:
    """Checks the operands, brings them to one dense layout and calls the backend's kernel."""
    out = _backward_output(MODULATED_NORM_BACKWARD.call(grad_y, x, mean, rstd, weight, scale, center))
    if x.numel():
        order = _order(x)
        vectors = (None if z is None else z.contiguous() for z in (weight, scale))
        statistics = (_arranged(z, order).view(-1) if z.numel() else z for z in (mean, rstd))
        given = (_arranged(grad_y, order), _arranged(x, order), *statistics)
        flat = out if order is None else out.permute(order)
        select("modulated_norm_backward", x)(flat, *given, *vectors, center)
    return out


# The arithmetic in plain torch operations, which the eager kernels and the formulas share


def _along(values: Tensor | None, x: Tensor) -> Tensor | None:
    """Returns values (C,) or (B, C) in the dtype of the arithmetic, in a shape that is broadcast over x."""
    if values is None:
        return None
    values = values.to(compute_dtype(x.dtype))
    return values if values.ndim == 1 else values.reshape(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])


def _statistics(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """Returns mean and rstd, of x's shape but for the last dimension; mean is (0,) without `center`."""
    wide = x.to(compute_dtype(x.dtype))
    mean = wide.mean(-1) if center else wide.new_empty(0)
    away = wide - mean.unsqueeze(-1) if center else wide
    return mean, away.square().mean(-1).add(eps).rsqrt()


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor, center: bool) -> Tensor:
    """Returns x less its mean, divided by its deviation, in the dtype of the arithmetic."""
    wide = x.to(compute_dtype(x.dtype))
    return ((wide - mean.unsqueeze(-1)) if center else wide) * rstd.unsqueeze(-1)


def _value(call: Any, mean: Tensor, rstd: Tensor) -> Tensor:
    """Returns y in the dtype of the arithmetic."""
    x = call.x
    y = _normalised(x, mean, rstd, call.center)
    weight, bias, scale, shift = (_along(z, x) for z in (call.weight, call.bias, call.scale, call.shift))
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    if scale is not None:
        y = y * (1 + scale)
    return y if shift is None else y + shift


def _formula(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the outputs by operations that can be transformed and differentiated in any mode."""
    x = call.x
    _check(x, weight=call.weight, bias=call.bias, scale=call.scale, shift=call.shift)
    mean, rstd = _statistics(x, call.eps, call.center)
    return cast(_value(call, mean, rstd), x.dtype), mean.detach(), rstd.detach()


def _input_gradient(call: Any) -> Tensor:
    """Returns the gradient of x in the dtype of the arithmetic."""
    x = call.x
    normalised = _normalised(x, call.mean, call.rstd, call.center)
    grad, weight, scale = call.grad_y.to(normalised.dtype), _along(call.weight, x), _along(call.scale, x)
    if scale is not None:
        grad = grad * (1 + scale)
    if weight is not None:
        grad = grad * weight
    result = grad - normalised * (grad * normalised).mean(-1, keepdim=True)
    if call.center:
        result = result - grad.mean(-1, keepdim=True)
    return result * call.rstd.unsqueeze(-1)


def _backward_formula(call: Any) -> Tensor:
    """Returns the gradient of x by operations that can be transformed and differentiated in any mode."""
    _backward_output(call)
    return cast(_input_gradient(call), call.x.dtype)


# The eager kernels, which get the statistics of all rows in one dimension


@eager(MODULATED_NORM)
def _eager(call: Any) -> None:
    """Fills y, mean and rstd."""
    mean, rstd = _statistics(call.x, call.eps, call.center)
    store(call.y, _value(call, mean, rstd))
    call.mean.copy_(mean.reshape(-1))
    call.rstd.copy_(rstd.reshape(-1))


@eager(MODULATED_NORM_BACKWARD)
def _backward_eager(call: Any) -> None:
    """Fills grad_x."""
    rows = call.x.shape[:-1]
    call = call._replace(rstd=call.rstd.reshape(rows), mean=call.mean.reshape(rows) if call.center else call.mean)
    store(call.grad_x, _input_gradient(call))


# Gradient and registration


def _remember(ctx: Any, call: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps what the backward pass needs."""
    if any(ctx.needs_input_grad[1:5]):
        raise RuntimeError(
            "modulated_norm: expected a frozen layer, but a gradient of weight, bias, scale or shift is wanted; detach "
            "them, or use torch.nn.functional.layer_norm or rms_norm, a product and a sum"
        )
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(call.x, mean, rstd, call.weight, call.scale)
    ctx.eps, ctx.center = call.eps, call.center


def _gradient(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor]:
    """Returns the gradient of x."""
    x, mean, rstd, weight, scale = ctx.saved_tensors
    if wants_gradient(grad_y, x):  # A second derivative needs mean and rstd as functions of x.
        mean, rstd = _statistics(x, ctx.eps, ctx.center)
    return (modulated_norm_backward(grad_y, x, mean, rstd, weight, scale, ctx.center),)


register(MODULATED_NORM, _forward, _outputs, remember=_remember, gradient=_gradient)
register(MODULATED_NORM_BACKWARD, _backward, _backward_output)
