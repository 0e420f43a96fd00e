"""The coupling: `target <- a target + c source + b eps`, its inverse and its vector-Jacobian product, one pass each.

With classifier-free guidance (arXiv 2207.12598) eps is the network's batched output `[uncond; cond]` of shape (2B,
...), and `eps = eps_u + g (eps_c - eps_u)` is formed on the way.

Arithmetic. In float64 if any operand is float64, else in float32; coefficients are rounded to that dtype first; no
multiplication is ever contracted with an addition into a fused multiply-add. In this order, `.` a rounding:

    coupling      r = a.t ;  r = r + c.s ;  e = u + g.(c - u) ;  r = r + b.e ;  out = round(r)
    vjp           out_t = a.gt ;  out_s = c.gt ;  q = (b.gt).scale ;  guided: h = g.q,  [uncond; cond] = [q - h; h]

Terms whose coefficient is zero (c, b) or whose operand is None are left out; every output is rounded once to its dtype,
to nearest even. All backends follow this order, so they agree bit for bit.

Shapes: target and source (B, ...), alike in dtype; eps (B, ...) or (2B, ...), of its own dtype; any rank, empty
included. Outputs are contiguous, or channels_last where the target is. Sources: EDICT (arXiv 2211.12446), DOODL (arXiv
2303.13703).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.registry import backend, choice, eager, select
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
from .transforms import cast, is_plain, is_transformed, needs_formula, refuse_tangents

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
    """`a target + c source + b (eps_u + g (eps_c - eps_u))`, or `b eps` without g; differentiable in its tensors.

    target, source: (B, ...) of one dtype. eps: (B, ...), or (2B, ...) = [uncond; cond] when g is given.
    out: where the result is written, dense memory of its own like target; not where a gradient is wanted.
    Returns a tensor of target's shape and dtype, `out` or a new one.
    Raises ValueError or TypeError, naming the argument.
    """
    if out is not None:
        check_out(target, {"out": out}, (target, source, eps))
    if is_plain(target, source, eps, out):
        return _coupling_forward(target, source, eps, a, c, b, g, out)
    if is_transformed(target, source, eps, out):
        if out is not None:
            raise ValueError("out: expected None under forward-mode differentiation and torch.func's transforms")
        return _coupling_formula(target, source, eps, a, c, b, g)
    result: Tensor = torch.ops.doodl_fast.coupling(target, source, eps, a, c, b, g)
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
    """What `coupling` was given as target, from its result: `(target - c source - b eps) / a`, by the same kernel.

    It is the coupling with `1/a, -c/a, -b/a`, so it is off by the rounding of those, a few ulp. Raises ValueError for
    `a = 0`, and as `coupling`.
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
    """The vector-Jacobian product of `coupling`: from the cotangent of its result to those of target, source and eps.

    grad: (B, ...). scale: a 0-dim tensor on its device that multiplies eps's cotangent, a power of two that keeps a
    half-precision network's backward pass in range. eps_dtype: the network's dtype; None when eps's cotangent is not
    wanted. want_source: whether the source's is.
    Returns (a grad, c grad or None, b grad scale or None), the last in eps's dtype and layout: (2B, ...) when g is
    given.
    """
    if is_plain(grad, scale):
        return _coupling_vjp_forward(grad, a, c, b, g, scale, eps_dtype, want_source)
    if needs_formula(grad, scale):
        return _coupling_vjp_formula(grad, a, c, b, g, scale, eps_dtype, want_source)
    outs = torch.ops.doodl_fast.coupling_vjp(grad, a, c, b, g, scale, eps_dtype, want_source)
    return unpack(outs, want_source, eps_dtype is not None)


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
    check_operands(target, source, eps, g)
    refuse_tangents("coupling", target, source, eps)
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
    check_floating(grad=grad)
    refuse_tangents("coupling_vjp", grad, scale)
    outs = _new_cotangents(grad, g, eps_dtype, want_source)
    if grad.numel():
        grad = grad.contiguous(memory_format=dense_format(grad))
        select("coupling_vjp", grad)(*outs, grad, prepared_scale(scale, grad, eps_dtype), a, c, b, g)
    return outs


def _new_cotangents(grad: Tensor, g: float | None, eps_dtype: torch.dtype | None, want_source: bool) -> Cotangents:
    layout = dense_format(grad)
    to_target = torch.empty_like(grad, memory_format=layout)
    return to_target, torch.empty_like(to_target) if want_source else None, new_eps(grad, eps_dtype, g, layout)


def new_eps(grad: Tensor, eps_dtype: torch.dtype | None, g: float | None, layout: torch.memory_format) -> Tensor | None:
    """An empty cotangent for the network, in its dtype and batch."""
    if eps_dtype is None:
        return None
    return new(eps_shape(grad, g is not None), eps_dtype, grad, layout)


def prepared_scale(scale: Tensor | None, grad: Tensor, eps_dtype: torch.dtype | None) -> Tensor | None:
    """The scale in the dtype of the arithmetic. Raises ValueError unless it is 0-dim and on grad's device."""
    if scale is None or eps_dtype is None:
        return None
    if scale.ndim or scale.device != grad.device:
        raise ValueError(f"scale: expected a 0-dim tensor on {grad.device}, got {tuple(scale.shape)} on {scale.device}")
    return scale.to(compute_dtype(grad.dtype, eps_dtype))


def unpack(outs: list[Tensor], want_source: bool, want_eps: bool) -> Cotangents:
    """A registered op returns a list, as a schema knows no optional outputs."""
    rest = iter(outs[1:])
    return outs[0], next(rest) if want_source else None, next(rest) if want_eps else None


# The reference kernels


def combined(eps: Tensor, g: float | None, dtype: torch.dtype) -> Tensor:
    """eps, or `eps_u + g (eps_c - eps_u)` of a batch of both, in the dtype of the arithmetic."""
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
    """The coupling before it is rounded; its operands are promoted to `dtype`."""
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
    """The network's cotangent: one tensor, or those of the unconditional and the conditional half of a guided batch."""
    if g is None:
        return (cotangent,)
    to_cond = g * cotangent
    return cotangent - to_cond, to_cond


def store_eps(out: Tensor, cotangent: Tensor, g: float | None) -> None:
    """Writes eps's cotangent, for both halves of a guided batch."""
    parts = halves(cotangent, g)
    for place, part in zip(out.chunk(len(parts)), parts, strict=True):
        store(place, part)


def eps_formula(cotangent: Tensor, scale: Tensor | None, g: float | None, eps_dtype: torch.dtype) -> Tensor:
    """eps's cotangent as a new tensor, in plain torch."""
    cotangent = cotangent if scale is None else cotangent * scale
    return torch.cat([cast(part, eps_dtype) for part in halves(cotangent, g)])


def _coupling_formula(
    target: Tensor,
    source: Tensor | None,
    eps: Tensor | None,
    a: float,
    c: float,
    b: float,
    g: float | None,
) -> Tensor:
    """The coupling in plain torch operations, which can be transformed and differentiated in any mode."""
    check_operands(target, source, eps, g)
    source = None if c == 0 else source
    eps = None if b == 0 else eps
    dtype = compute_dtype(target.dtype, target.dtype if eps is None else eps.dtype)
    result = cast(moved(target, source, eps, (a, c, b), g, dtype), target.dtype)
    return result.clone() if result is target else result


def _coupling_vjp_formula(
    grad: Tensor,
    a: float,
    c: float,
    b: float,
    g: float | None,
    scale: Tensor | None,
    eps_dtype: torch.dtype | None,
    want_source: bool,
) -> Cotangents:
    """The vector-Jacobian product in plain torch operations."""
    check_floating(grad=grad)
    scale = prepared_scale(scale, grad, eps_dtype)
    wide = grad.to(compute_dtype(grad.dtype, grad.dtype if eps_dtype is None else eps_dtype))
    to_target = cast(wide * a, grad.dtype)
    to_source = cast(wide * c, grad.dtype) if want_source else None
    return to_target, to_source, None if eps_dtype is None else eps_formula(wide * b, scale, g, eps_dtype)


@eager
def _coupling(
    out: Tensor,
    target: Tensor,
    source: Tensor | None,
    eps: Tensor | None,
    a: float,
    c: float,
    b: float,
    g: float | None,
) -> None:
    dtype = compute_dtype(target.dtype, target.dtype if eps is None else eps.dtype)
    store(out, moved(target, source, eps, (a, c, b), g, dtype))


@eager
def _coupling_vjp(
    out: Tensor,
    to_source: Tensor | None,
    to_eps: Tensor | None,
    grad: Tensor,
    scale: Tensor | None,
    a: float,
    c: float,
    b: float,
    g: float | None,
) -> None:
    grad = grad.to(compute_dtype(grad.dtype, grad.dtype if to_eps is None else to_eps.dtype))
    store(out, grad * a)
    if to_source is not None:
        store(to_source, grad * c)
    if to_eps is not None:
        cotangent = grad * b
        store_eps(to_eps, cotangent if scale is None else cotangent * scale, g)


# Registration


_coupling_op = torch.library.custom_op(
    "doodl_fast::coupling",
    mutates_args=(),
    schema="(Tensor target, Tensor? source, Tensor? eps, float a, float c, float b, float? g) -> Tensor",
)(_coupling_forward)


@_coupling_op.register_fake
def _(target: Tensor, source: Tensor | None, eps: Tensor | None, *coefficients: Any) -> Tensor:
    check_operands(target, source, eps, coefficients[-1])
    return torch.empty_like(target, memory_format=dense_format(target))


@torch.library.custom_op(
    "doodl_fast::coupling_vjp",
    mutates_args=(),
    schema="(Tensor grad, float a, float c, float b, float? g, Tensor? scale, ScalarType? eps_dtype, bool want_source)"
    " -> Tensor[]",
)
def _coupling_vjp_op(*arguments: Any) -> list[Tensor]:
    return [out for out in _coupling_vjp_forward(*arguments) if out is not None]


@_coupling_vjp_op.register_fake
def _(grad: Tensor, *rest: Any) -> list[Tensor]:
    *_, g, _, eps_dtype, want_source = rest
    return [out for out in _new_cotangents(grad, g, eps_dtype, want_source) if out is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, eps, *ctx.coefficients = inputs
    ctx.eps_dtype = None if eps is None else eps.dtype
    ctx.backend = choice()  # autograd may run the backward pass in a thread of its own, which has no context


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_target, needs_source, needs_eps, *_ = ctx.needs_input_grad
    a, c, b, g = ctx.coefficients
    with backend(ctx.backend):
        to_target, to_source, to_eps = coupling_vjp(
            grad, a, c, b, g, eps_dtype=ctx.eps_dtype if needs_eps else None, want_source=needs_source
        )
    return to_target if needs_target else None, to_source, to_eps, None, None, None, None


_coupling_op.register_autograd(_backward, setup_context=_setup)
