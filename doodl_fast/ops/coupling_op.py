"""The coupling `target <- a target + c source + b eps`, its inverse and its vector-Jacobian product (VJP).

Each is computed in one pass over memory. With classifier-free guidance (arXiv 2207.12598), eps is the network's output
for the batch `[uncond; cond]`, of shape (2B, ...), and the pass forms `eps_u + g (eps_c - eps_u)` on the way.

Arithmetic: it is done in float64 if any operand is float64, else in float32. Coefficients are first rounded to that
dtype. A multiplication is never contracted with an addition into a fused multiply-add. The operations have this order,
where `.` is a multiplication and every operation rounds its result:

    coupling      r = a.t ;  r = r + c.s ;  e = u + g.(c - u) ;  r = r + b.e ;  out = round(r)
    VJP           out_t = a.gt ;  out_s = c.gt ;  q = (b.gt).scale ;  guided: h = g.q,  [uncond; cond] = [q - h; h]

A term is left out if its coefficient (c or b) is zero or its operand is None. Every output is rounded once to its own
dtype, to nearest even. All backends follow this order, so they agree bit for bit.

Shapes: target and source are (B, ...) and have one dtype; eps is (B, ...) or (2B, ...) and may have another. Any number
of dimensions is allowed, and tensors may be empty. Outputs are contiguous, or channels_last where the target is.

The coupling is the step of EDICT (arXiv 2211.12446), which DOODL (arXiv 2303.13703) differentiates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.registry import eager, select
from .layout import (
    check_floating,
    check_operands,
    check_out,
    compute_dtype,
    dense_format,
    eps_shape,
    new,
    store,
)
from .registration import register, registered
from .signatures import COUPLING, COUPLING_VJP
from .transforms import cast, is_plain, is_transformed, needs_formula

Cotangents = tuple[Tensor, Tensor | None, Tensor | None]

# The public functions


def coupling(
    target: Tensor,
    source: Tensor | None = None,
    eps: Tensor | None = None,
    a: float = 1.0,
    c: float = 0.0,
    b: float = 0.0,
    g: float | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `a target + c source + b e`, where e is eps, or `eps_u + g (eps_c - eps_u)` under guidance.

    It is differentiable in target, source and eps, in every mode and to any order.

    Args:
        target: Latents (B, ...) in float16, bfloat16, float32 or float64.
        source: Latents of target's shape, dtype and device, or None.
        eps: The network's output, in any of the four dtypes: (B, ...), or with `g` (2B, ...) = [uncond; cond]; or None.
        a: The factor of target.
        c: The factor of source.
        b: The factor of e.
        g: The guidance scale, or None if eps is not a guided batch.
        out: A tensor like target that the result is written into. Its memory must be dense and its own. It cannot be
            given where a gradient is wanted.

    Returns:
        A tensor of target's shape and dtype: `out`, or a new one.

    Raises:
        ValueError: Shapes or devices do not fit together, or `out` cannot be written into.
        TypeError: A dtype does not fit.

    Example:
        >>> x = ops.coupling(x, None, eps, a=0.9, b=-0.1, g=7.5)  # One guided DDIM step.
    """
    if out is not None:
        check_out(target, {"out": out}, (target, source, eps))
    if is_plain(target, source, eps, out):
        return _coupling_forward(target, source, eps, a, c, b, g, out)
    if is_transformed(target, source, eps, out):
        if out is not None:
            raise ValueError("out: expected None under forward-mode differentiation and torch.func's transforms")
        return _coupling_formula(COUPLING.call(target, source, eps, a, c, b, g))
    result: Tensor = registered.coupling(target, source, eps, a, c, b, g)
    return result if out is None else out.copy_(result)


def coupling_inverse(
    target: Tensor,
    source: Tensor | None = None,
    eps: Tensor | None = None,
    a: float = 1.0,
    c: float = 0.0,
    b: float = 0.0,
    g: float | None = None,
) -> Tensor:
    """Computes the target that `coupling` was given, from its result: `(target - c source - b e) / a`.

    It is the coupling with the coefficients `1/a, -c/a, -b/a`, whose rounding makes the result differ from the original
    in its last bits.

    Args:
        target: The result of `coupling`, (B, ...).
        source: As in `coupling`.
        eps: As in `coupling`.
        a: As in `coupling`, but not 0.
        c: As in `coupling`.
        b: As in `coupling`.
        g: As in `coupling`.

    Returns:
        A new tensor of target's shape and dtype.

    Raises:
        ValueError: `a` is 0, or as in `coupling`.
        TypeError: As in `coupling`.
    """
    if a == 0:
        raise ValueError("a: expected a number other than 0: such a coupling cannot be undone")
    return coupling(target, source, eps, 1 / a, -c / a, -b / a, g)


def coupling_vjp(
    grad: Tensor,
    a: float = 1.0,
    c: float = 0.0,
    b: float = 0.0,
    g: float | None = None,
    scale: Tensor | None = None,
    eps_dtype: torch.dtype | None = None,
    want_source: bool = False,
) -> Cotangents:
    """Computes the vector-Jacobian product of `coupling`: the cotangents of target, source and eps.

    Args:
        grad: The cotangent (B, ...) of the coupling's result.
        a: As in `coupling`.
        c: As in `coupling`.
        b: As in `coupling`.
        g: As in `coupling`.
        scale: A 0-dim tensor on grad's device that multiplies the cotangent of eps, or None. A power of two keeps the
            backward pass of a half-precision network in range.
        eps_dtype: The network's dtype, or None if the cotangent of eps is not wanted.
        want_source: Whether the cotangent of source is wanted.

    Returns:
        The cotangents of target, source (or None) and eps (or None). That of eps has the network's dtype, and the shape
        (2B, ...) if `g` is given.

    Raises:
        ValueError: `scale` is not a 0-dim tensor on grad's device.
        TypeError: grad's dtype is not one of the four.
    """
    if is_plain(grad, scale):
        return _coupling_vjp_forward(grad, a, c, b, g, scale, eps_dtype, want_source)
    if needs_formula(grad, scale):
        return _coupling_vjp_formula(COUPLING_VJP.call(grad, a, c, b, g, scale, eps_dtype, want_source))
    outs = iter(registered.coupling_vjp(grad, a, c, b, g, scale, eps_dtype, want_source))
    return next(outs), next(outs) if want_source else None, next(outs) if eps_dtype is not None else None


# From tensors of any layout to a backend's kernel


def _coupling_forward(
    target: Tensor,
    source: Tensor | None,
    eps: Tensor | None,
    a: float,
    c: float,
    b: float,
    g: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """Checks the operands, brings them to one layout and calls the backend's kernel."""
    check_operands(target, source, eps, g)
    layout = dense_format(target)
    if out is None:
        out = torch.empty_like(target, memory_format=layout)
    if out.numel():
        select("coupling", target)(
            out,
            target.contiguous(memory_format=layout),
            None if source is None or c == 0 else source.contiguous(memory_format=layout),
            None if eps is None or b == 0 else eps.contiguous(memory_format=layout),
            a,
            c,
            b,
            None if b == 0 else g,
        )
    return out


def _coupling_fake(call: Any) -> Tensor:
    """Returns the output of `_coupling_forward` without its values."""
    check_operands(call.target, call.source, call.eps, call.g)
    return torch.empty_like(call.target, memory_format=dense_format(call.target))


def _coupling_vjp_forward(
    grad: Tensor,
    a: float,
    c: float,
    b: float,
    g: float | None,
    scale: Tensor | None,
    eps_dtype: torch.dtype | None,
    want_source: bool,
) -> Cotangents:
    """Checks the cotangent, brings it to a dense layout and calls the backend's kernel."""
    check_floating(grad=grad)
    outs = _new_cotangents(grad, g, eps_dtype, want_source)
    if grad.numel():
        grad = grad.contiguous(memory_format=dense_format(grad))
        select("coupling_vjp", grad)(*outs, grad, prepared_scale(scale, grad, eps_dtype), a, c, b, g)
    return outs


def _new_cotangents(grad: Tensor, g: float | None, eps_dtype: torch.dtype | None, want_source: bool) -> Cotangents:
    """Returns uninitialised tensors for the cotangents that are wanted."""
    layout = dense_format(grad)
    to_target = torch.empty_like(grad, memory_format=layout)
    return to_target, torch.empty_like(to_target) if want_source else None, new_eps(grad, eps_dtype, g, layout)


def new_eps(grad: Tensor, eps_dtype: torch.dtype | None, g: float | None, layout: torch.memory_format) -> Tensor | None:
    """Returns an uninitialised cotangent of eps, in the network's dtype and batch, or None if it is not wanted."""
    if eps_dtype is None:
        return None
    return new(eps_shape(grad, g is not None), eps_dtype, grad, layout)


def prepared_scale(scale: Tensor | None, grad: Tensor, eps_dtype: torch.dtype | None) -> Tensor | None:
    """Returns the scale in the dtype of the arithmetic. Raises ValueError unless it is 0-dim and on grad's device."""
    if scale is None or eps_dtype is None:
        return None
    if scale.ndim or scale.device != grad.device:
        raise ValueError(f"scale: expected a 0-dim tensor on {grad.device}, got {tuple(scale.shape)} on {scale.device}")
    return scale.to(compute_dtype(grad.dtype, eps_dtype))


# The arithmetic in plain torch operations, which the eager kernels and the formulas share


def combined(eps: Tensor, g: float | None, dtype: torch.dtype) -> Tensor:
    """Returns eps, or `eps_u + g (eps_c - eps_u)` of a guided batch, in the dtype of the arithmetic."""
    if g is None:
        return eps.to(dtype)
    uncond, cond = eps.to(dtype).chunk(2)
    return uncond + g * (cond - uncond)


def moved(
    target: Tensor,
    source: Tensor | None,
    eps: Tensor | None,
    coefficients: tuple[float, float, float],
    g: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the result of the coupling in `dtype`, the dtype of the arithmetic, before it is rounded."""
    a, c, b = coefficients
    result = target.to(dtype)
    if a != 1:
        result = result * a
    if source is not None:
        result = result + source.to(dtype) * c
    if eps is not None:
        result = result + combined(eps, g, dtype) * b
    return result


def halves(cotangent: Tensor, g: float | None) -> tuple[Tensor, ...]:
    """Returns the cotangent of eps, or those of the unconditional and the conditional half of a guided batch."""
    if g is None:
        return (cotangent,)
    to_cond = g * cotangent
    return cotangent - to_cond, to_cond


def store_eps(out: Tensor, cotangent: Tensor, g: float | None) -> None:
    """Writes the cotangent of eps, in both halves of a guided batch."""
    parts = halves(cotangent, g)
    for place, part in zip(out.chunk(len(parts)), parts, strict=True):
        store(place, part)


def eps_formula(cotangent: Tensor, scale: Tensor | None, g: float | None, eps_dtype: torch.dtype) -> Tensor:
    """Returns the cotangent of eps as a new tensor, which can be differentiated again."""
    cotangent = cotangent if scale is None else cotangent * scale
    return torch.cat([cast(part, eps_dtype) for part in halves(cotangent, g)])


def _coupling_formula(call: Any) -> Tensor:
    """Returns the result of the coupling by operations that can be transformed and differentiated in any mode."""
    check_operands(call.target, call.source, call.eps, call.g)
    target: Tensor = call.target
    source = None if call.c == 0 else call.source
    eps = None if call.b == 0 else call.eps
    dtype = compute_dtype(target.dtype, target.dtype if eps is None else eps.dtype)
    result = cast(moved(target, source, eps, (call.a, call.c, call.b), call.g, dtype), target.dtype)
    return result.clone() if result is target else result


def _coupling_vjp_formula(call: Any) -> Cotangents:
    """Returns the cotangents by operations that can be transformed and differentiated in any mode."""
    grad, eps_dtype = call.grad, call.eps_dtype
    check_floating(grad=grad)
    scale = prepared_scale(call.scale, grad, eps_dtype)
    wide = grad.to(compute_dtype(grad.dtype, grad.dtype if eps_dtype is None else eps_dtype))
    to_target = cast(wide * call.a, grad.dtype)
    to_source = cast(wide * call.c, grad.dtype) if call.want_source else None
    return to_target, to_source, None if eps_dtype is None else eps_formula(wide * call.b, scale, call.g, eps_dtype)


# The eager kernels


@eager(COUPLING)
def _coupling_eager(call: Any) -> None:
    """Fills `out`."""
    dtype = compute_dtype(call.target.dtype, call.target.dtype if call.eps is None else call.eps.dtype)
    store(call.out, moved(call.target, call.source, call.eps, (call.a, call.c, call.b), call.g, dtype))


@eager(COUPLING_VJP)
def _coupling_vjp_eager(call: Any) -> None:
    """Fills `out`, and those of `out_source` and `out_eps` that are not None."""
    narrow = call.grad.dtype
    grad = call.grad.to(compute_dtype(narrow, narrow if call.out_eps is None else call.out_eps.dtype))
    store(call.out, grad * call.a)
    if call.out_source is not None:
        store(call.out_source, grad * call.c)
    if call.out_eps is not None:
        cotangent = grad * call.b
        store_eps(call.out_eps, cotangent if call.scale is None else cotangent * call.scale, call.g)


# Gradient and registration


def _remember(ctx: Any, call: Any, _: Any) -> None:
    """Keeps what the backward pass of `coupling` needs."""
    ctx.coefficients = call.a, call.c, call.b, call.g
    ctx.eps_dtype = None if call.eps is None else call.eps.dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the cotangents of target, source and eps."""
    needs_target, needs_source, needs_eps, *_ = ctx.needs_input_grad
    a, c, b, g = ctx.coefficients
    eps_dtype = ctx.eps_dtype if needs_eps else None
    to_target, to_source, to_eps = coupling_vjp(grad, a, c, b, g, eps_dtype=eps_dtype, want_source=needs_source)
    return to_target if needs_target else None, to_source, to_eps


register(COUPLING, _coupling_forward, _coupling_fake, remember=_remember, gradient=_gradient)
register(
    COUPLING_VJP,
    _coupling_vjp_forward,
    lambda call: _new_cotangents(call.grad, call.g, call.eps_dtype, call.want_source),
)
