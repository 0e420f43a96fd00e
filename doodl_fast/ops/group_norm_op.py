"""GroupNorm with SiLU after it, as a layer of a frozen network: the layer itself, and the gradient of its input alone.

    mean, rstd       of each group of channels of each sample; rstd = 1 / sqrt(variance + eps)
    z = (x - mean) rstd weight + bias
    y = z sigmoid(z), or z without SiLU

PyTorch keeps x, z, mean, rstd and both weights for a backward pass of GroupNorm and SiLU. These ops need x, mean and
rstd: the backward pass computes z again. GroupNorm is arXiv 1803.08494, SiLU arXiv 1606.08415; not keeping z is the
idea of memsave_torch (arXiv 2404.12406).

Arithmetic: it is done in float64 for float64, else in float32; y and the gradient are rounded once to x's dtype. The
order of the sums, and which multiplication and addition are fused, depend on the backend. So the backends agree up to
rounding, unlike those of the ops on latents. On an x86-64 CPU the native kernels give the bits of PyTorch's own kernels
for contiguous float32 tensors with weights (`matches_torch` finds out whether they do). For channels_last tensors they
are closer to the exact result than PyTorch's, which sum up squares without subtracting a mean, and for float16 and
bfloat16 too, because PyTorch rounds z to the tensor's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends.registry import eager, select
from .layout import DTYPES, check_floating, check_same, compute_dtype, dense_format, store
from .matching import compared
from .registration import register, registered
from .signatures import GROUP_NORM_SILU, GROUP_NORM_SILU_BACKWARD
from .transforms import cast, is_plain, is_transformed, needs_formula, wants_gradient

# The public functions


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float = 1e-5,
    silu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `silu(group_norm(x))` in one op. It is differentiable in x alone, as the weights are frozen.

    Args:
        x: The input (N, C, ...) in float16, bfloat16, float32 or float64. Contiguous and channels_last tensors are used
            in place.
        weight: The factor (C,) of each channel, or None.
        bias: The summand (C,) of each channel, or None.
        num_groups: The number of groups that the channels are divided into.
        eps: What is added to the variance.
        silu: Whether SiLU follows. Without it, the op is GroupNorm.

    Returns:
        y of x's shape, dtype and layout; and mean and rstd (N, num_groups), in float64 for float64, else in float32.
        Mean and rstd are not differentiable. `group_norm_silu_backward` takes them.

    Raises:
        ValueError: Shapes or devices do not fit together.
        TypeError: A dtype does not fit.
        RuntimeError: A gradient of weight or bias is wanted.

    Example:
        >>> y, mean, rstd = ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
        >>> grad_x = ops.group_norm_silu_backward(grad_y, x, mean, rstd, norm.weight, norm.bias, norm.num_groups)
    """
    if is_plain(x, weight, bias):
        return _forward(x, weight, bias, num_groups, eps, silu)
    if is_transformed(x, weight, bias):
        return _formula(GROUP_NORM_SILU.call(x, weight, bias, num_groups, eps, silu))
    y, mean, rstd = registered.group_norm_silu(x, weight, bias, num_groups, eps, silu)
    return y, mean, rstd


def group_norm_silu_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    silu: bool = True,
) -> Tensor:
    """Computes the gradient of the input of `group_norm_silu`, and not those of the weights.

    Args:
        grad_y: The gradient of y, of x's shape and dtype.
        x: The input of `group_norm_silu`.
        mean: The means (N, num_groups) that `group_norm_silu` returned.
        rstd: The inverse standard deviations (N, num_groups) that `group_norm_silu` returned.
        weight: As in `group_norm_silu`.
        bias: As in `group_norm_silu`.
        num_groups: As in `group_norm_silu`.
        silu: As in `group_norm_silu`.

    Returns:
        The gradient of x, of x's shape, dtype and layout.

    Raises:
        ValueError: Shapes or devices do not fit together.
        TypeError: A dtype does not fit.
    """
    tensors = (grad_y, x, mean, rstd, weight, bias)
    if is_plain(*tensors):
        return _backward(*tensors, num_groups, silu)
    if needs_formula(*tensors):
        return _backward_formula(GROUP_NORM_SILU_BACKWARD.call(*tensors, num_groups, silu))
    result: Tensor = registered.group_norm_silu_backward(*tensors, num_groups, silu)
    return result


@compared("group_norm_silu")
def _same_bits() -> bool:
    """Whether values and gradients have the bits of PyTorch's kernels for a few tensors."""
    generator = torch.Generator().manual_seed(0)
    for shape, groups in (((2, 60, 5, 7), 3), ((1, 120, 2, 3), 2), ((1, 20, 64, 65), 2)):
        x, grad = (torch.randn(shape, generator=generator, device="cpu") for _ in range(2))
        weight, bias = torch.randn(2, shape[1], generator=generator, device="cpu")
        with torch.enable_grad():
            leaf = (x + 0.5).requires_grad_()
            want = F.silu(F.group_norm(leaf, groups, weight, bias, 1e-5))
            (want_grad,) = torch.autograd.grad(want, leaf, grad)
        y, mean, rstd = _forward(x + 0.5, weight, bias, groups, 1e-5, True)
        got_grad = _backward(grad, x + 0.5, mean, rstd, weight, bias, groups, True)
        if not (torch.equal(y, want) and torch.equal(got_grad, want_grad)):
            return False
    return True


# From tensors of any layout to a backend's kernel


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int) -> None:
    """Raises ValueError or TypeError, which names the argument, if the operands do not fit together."""
    shape, device, dtype = x.shape, x.device, x.dtype
    if (  # It is called before every kernel, so the usual case is tested first.
        dtype in DTYPES
        and len(shape) >= 2
        and num_groups >= 1
        and shape[1] % num_groups == 0
        and all(
            z is None or (z.dtype is dtype and z.ndim == 1 and z.shape[0] == shape[1] and z.device == device)
            for z in (weight, bias)
        )
    ):
        return
    check_floating(x=x, weight=weight, bias=bias)
    if x.ndim < 2:
        raise ValueError(f"x: expected a tensor (N, C, ...), got the shape {tuple(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of x's {channels} channels, got {num_groups}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.shape != (channels,) or tensor.device != x.device:
            expected = f"expected the shape ({channels},) on {x.device}"
            raise ValueError(f"{name}: {expected}, got {tuple(tensor.shape)} on {tensor.device}")
        if tensor.dtype == torch.float64 != x.dtype:
            raise TypeError(f"{name}: expected at most float32 with x in {x.dtype}, got {tensor.dtype}")


def _check_statistics(x: Tensor, num_groups: int, mean: Tensor, rstd: Tensor) -> None:
    """Raises ValueError or TypeError unless mean and rstd are what `group_norm_silu` returns for x."""
    expected, dtype = (x.shape[0], num_groups), compute_dtype(x.dtype)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor.shape != expected or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected the shape {expected} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} with x in {x.dtype}, got {tensor.dtype}")


def _outputs(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the operands and returns uninitialised tensors for y, mean and rstd."""
    x = call.x
    _check(x, call.weight, call.bias, call.num_groups)
    mean = x.new_empty(x.shape[0], call.num_groups, dtype=compute_dtype(x.dtype))
    rstd = torch.empty_like(mean)
    return torch.empty_like(x, memory_format=dense_format(x)), mean, rstd


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the operands, brings x to a dense layout and calls the backend's kernel."""
    outs = _outputs(GROUP_NORM_SILU.call(x, weight, bias, num_groups, eps, silu))
    if not x.numel():
        return outs[0], outs[1].zero_(), outs[2].fill_(eps**-0.5 if eps > 0 else torch.inf)
    x = x.contiguous(memory_format=dense_format(x))
    select("group_norm_silu", x)(*outs, x, _dense(weight), _dense(bias), num_groups, eps, silu)
    return outs


def _backward_output(call: Any) -> Tensor:
    """Checks the operands and returns an uninitialised tensor for the gradient of x."""
    x = call.x
    _check(x, call.weight, call.bias, call.num_groups)
    check_same("x", x, grad_y=call.grad_y)
    _check_statistics(x, call.num_groups, call.mean, call.rstd)
    return torch.empty_like(x, memory_format=dense_format(x))


def _backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    silu: bool,
) -> Tensor:
    """Checks the operands, brings them to one dense layout and calls the backend's kernel."""
    out = _backward_output(GROUP_NORM_SILU_BACKWARD.call(grad_y, x, mean, rstd, weight, bias, num_groups, silu))
    if x.numel():
        layout = dense_format(x)
        grad_y, x = grad_y.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
        statistics = mean.contiguous(), rstd.contiguous()
        kernel = select("group_norm_silu_backward", x)
        kernel(out, grad_y, x, *statistics, _dense(weight), _dense(bias), num_groups, silu)
    return out


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# The arithmetic in plain torch operations, which the eager kernels and the formulas share


def _per_channel(values: Tensor | None, x: Tensor) -> Tensor | None:
    """Returns values (C,) in the dtype of the arithmetic, in a shape that is broadcast over x."""
    return None if values is None else values.to(compute_dtype(x.dtype)).reshape(1, -1, *[1] * (x.ndim - 2))


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """Returns x in the dtype of the arithmetic as (N, num_groups, elements of a group)."""
    return x.to(compute_dtype(x.dtype)).reshape(x.shape[0], num_groups, -1)


def _statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Returns mean and rstd (N, num_groups)."""
    groups = _grouped(x, num_groups)
    mean = groups.mean(-1)
    return mean, (groups - mean.unsqueeze(-1)).square().mean(-1).add(eps).rsqrt()


def _argument(x: Tensor, mean: Tensor, rstd: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    """Returns the normalised x as (N, num_groups, elements of a group), and SiLU's argument in x's shape."""
    normalised = (_grouped(x, call.num_groups) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    z, weight, bias = normalised.reshape(x.shape), _per_channel(call.weight, x), _per_channel(call.bias, x)
    if weight is not None:
        z = z * weight
    return normalised, z if bias is None else z + bias


def _formula(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the outputs by operations that can be transformed and differentiated in any mode."""
    x = call.x
    _check(x, call.weight, call.bias, call.num_groups)
    mean, rstd = _statistics(x, call.num_groups, call.eps)
    _, z = _argument(x, mean, rstd, call)
    return cast(F.silu(z) if call.silu else z, x.dtype), mean.detach(), rstd.detach()


def _input_gradient(call: Any) -> Tensor:
    """Returns the gradient of x in the dtype of the arithmetic, in x's shape."""
    x = call.x
    normalised, z = _argument(x, call.mean, call.rstd, call)
    grad, weight = call.grad_y.to(z.dtype), _per_channel(call.weight, x)
    if call.silu:
        sigmoid = torch.sigmoid(z)
        grad = grad * sigmoid * (1 + z * (1 - sigmoid))
    if weight is not None:
        grad = grad * weight
    grad = grad.reshape(normalised.shape)
    product = (grad * normalised).mean(-1, keepdim=True)
    result = (grad - grad.mean(-1, keepdim=True) - normalised * product) * call.rstd.unsqueeze(-1)
    return result.reshape(x.shape)


def _backward_formula(call: Any) -> Tensor:
    """Returns the gradient of x by operations that can be transformed and differentiated in any mode."""
    _backward_output(call)
    return cast(_input_gradient(call), call.x.dtype)


# The eager kernels


@eager(GROUP_NORM_SILU)
def _eager(call: Any) -> None:
    """Fills y, mean and rstd."""
    x, dtype = call.x.to(call.mean.dtype), call.mean.dtype
    weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (call.weight, call.bias))
    n, channels = x.shape[:2]
    pixels = x[0, 0].numel()
    if not x.is_cpu:  # PyTorch's kernel for GPUs takes contiguous tensors alone.
        x = x.contiguous()
    y, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, pixels, call.num_groups, call.eps)
    store(call.y, F.silu(y) if call.silu else y)
    call.mean.copy_(mean)
    call.rstd.copy_(rstd)


@eager(GROUP_NORM_SILU_BACKWARD)
def _backward_eager(call: Any) -> None:
    """Fills grad_x."""
    store(call.grad_x, _input_gradient(call))


# Gradient and registration


def _remember(ctx: Any, call: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps what the backward pass needs."""
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError(
            "group_norm_silu: expected frozen weights, but a gradient of weight or bias is wanted; call "
            "requires_grad_(False) on them, or use torch.nn.functional.group_norm and silu"
        )
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(call.x, mean, rstd, call.weight, call.bias)
    ctx.num_groups, ctx.eps, ctx.silu = call.num_groups, call.eps, call.silu


def _gradient(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor]:
    """Returns the gradient of x."""
    x, mean, rstd, weight, bias = ctx.saved_tensors
    if wants_gradient(grad_y, x):  # A second derivative needs mean and rstd as functions of x.
        mean, rstd = _statistics(x, ctx.num_groups, ctx.eps)
    return (group_norm_silu_backward(grad_y, x, mean, rstd, weight, bias, ctx.num_groups, ctx.silu),)


register(GROUP_NORM_SILU, _forward, _outputs, remember=_remember, gradient=_gradient)
register(GROUP_NORM_SILU_BACKWARD, _backward, _backward_output)
