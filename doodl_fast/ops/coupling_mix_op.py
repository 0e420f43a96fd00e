"""A coupling and the two mixing couplings after it in one pass, the VJP of that, and the mixing alone.

EDICT (arXiv 2211.12446) ends every step with `x <- p x + (1-p) y`, `y <- p y + (1-p) x`, which need no network. With
t the target of the coupling and s its source, `coupling_mix` computes

    t1 = a t + c s + b eps                                       (`coupling`, eps guided or not)
    target first:   t2 = a0 t1 + c0 s ;   s2 = a1 s + c1 t2
    source first:   s2 = a0 s + c0 t1 ;   t2 = a1 t1 + c1 s2

Without eps, and with a = 1 and c = 0, it is the mixing alone. The inverse of a mixing is a mixing in the opposite order
(`Mixing.inverse`). The inverse of a whole `coupling_mix` is not one call, because the network has to be evaluated
between the inverse of the mixing and the inverse of the coupling.

Arithmetic: the dtype and the rule for multiply-adds are those of `coupling`. t1, t2 and s2 stay in the dtype of the
arithmetic until each output is rounded once. The operations have this order, where `.` is a multiplication and every
operation rounds its result; f is the value that is mixed first, o the other:

    mixing   f = a0.f ;  f = f + c0.o ;  o = a1.o ;  o = o + c1.f
    VJP      f = gf + c1.go ;  o = a1.go ;  o = o + c0.f ;  f = a0.f           (the transpose of the mixing)
             then, of these two, gt1 belongs to t1 and gs to s:
             q = (b.gt1).scale ;  out_s = gs + c.gt1 ;  out_t = a.gt1 ;  the cotangent of eps as in `coupling`

A term is left out if its coefficient is zero in the dtype of the arithmetic, and a multiplication by one is left out.
Shapes and memory layouts are those of `coupling`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.registry import eager, select
from .coupling_op import eps_formula, moved, new_eps, prepared_scale, store_eps
from .layout import (
    check_floating,
    check_operands,
    check_out,
    check_same,
    compute_dtype,
    dense_format,
    store,
    vanishes,
)
from .registration import register, registered
from .signatures import COUPLING_MIX, COUPLING_MIX_VJP
from .transforms import cast, is_plain, is_transformed, needs_formula

Pair = tuple[Tensor, Tensor]
Cotangents = tuple[Tensor, Tensor, Tensor | None]


class Mixing(NamedTuple):
    """Two couplings without a network: the first changes t (or s), the second the other.

    Attributes:
        target_first: Whether the first one changes t, the target of the coupling before it.
        a0: The factor of the value that the first one changes.
        c0: The factor of the other value in the first one.
        a1: The factor of the value that the second one changes.
        c1: The factor of the other value in the second one.
    """

    target_first: bool
    a0: float
    c0: float
    a1: float
    c1: float

    def inverse(self) -> Mixing:
        """Returns the mixing that undoes this one.

        Raises:
            ZeroDivisionError: a0 or a1 is 0.
        """
        return Mixing(not self.target_first, 1 / self.a1, -self.c1 / self.a1, 1 / self.a0, -self.c0 / self.a0)


# The public functions


def coupling_mix(
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    mixing: Mixing,
    a: float = 1.0,
    c: float = 0.0,
    b: float = 0.0,
    g: float | None = None,
    *,
    out: Pair | None = None,
) -> Pair:
    """Computes a coupling and the mixing after it. It is differentiable in its tensors, in every mode and to any order.

    Args:
        target: Latents (B, ...) in float16, bfloat16, float32 or float64.
        source: Latents of target's shape, dtype and device.
        eps: The network's output: (B, ...), or with `g` (2B, ...) = [uncond; cond]; or None.
        mixing: The mixing.
        a: The factor of target in the coupling.
        c: The factor of source in the coupling.
        b: The factor of eps in the coupling.
        g: The guidance scale, or None if eps is not a guided batch.
        out: A pair of tensors that the results are written into; otherwise as in `coupling`.

    Returns:
        Target and source after both: `out`, or new tensors.

    Raises:
        ValueError: Shapes or devices do not fit together, or `out` cannot be written into.
        TypeError: A dtype does not fit.
    """
    outs: tuple[Tensor, ...] = () if out is None else tuple(out)
    if out is not None:
        check_out(target, dict(zip(("out[0]", "out[1]"), out, strict=True)), (target, source, eps))
    if is_plain(target, source, eps, *outs):
        return _coupling_mix_forward(target, source, eps, *mixing, a, c, b, g, out=out)
    if is_transformed(target, source, eps, *outs):
        if out is not None:
            raise ValueError("out: expected None under forward-mode differentiation and torch.func's transforms")
        return _coupling_mix_formula(COUPLING_MIX.call(target, source, eps, *mixing, a, c, b, g))
    pair: Pair = registered.coupling_mix(target, source, eps, *mixing, a, c, b, g)
    return pair if out is None else (out[0].copy_(pair[0]), out[1].copy_(pair[1]))


def mix(target: Tensor, source: Tensor, mixing: Mixing) -> Pair:
    """Computes the mixing alone.

    Args:
        target: Latents (B, ...).
        source: Latents of target's shape, dtype and device.
        mixing: The mixing.

    Returns:
        New tensors: target and source after it.

    Raises:
        ValueError: Shapes or devices differ.
        TypeError: A dtype does not fit.
    """
    return coupling_mix(target, source, None, mixing)


def mix_inverse(target: Tensor, source: Tensor, mixing: Mixing) -> Pair:
    """Undoes `mix` up to rounding. Arguments, results and errors are those of `mix`."""
    return coupling_mix(target, source, None, mixing.inverse())


def coupling_mix_vjp(
    grad_target: Tensor,
    grad_source: Tensor,
    mixing: Mixing,
    a: float = 1.0,
    c: float = 0.0,
    b: float = 0.0,
    g: float | None = None,
    scale: Tensor | None = None,
    eps_dtype: torch.dtype | None = None,
) -> Cotangents:
    """Computes the vector-Jacobian product of `coupling_mix`: the cotangents of target, source and eps.

    Args:
        grad_target: The cotangent (B, ...) of the resulting target.
        grad_source: The cotangent of the resulting source, of the same shape, dtype and device.
        mixing: As in `coupling_mix`.
        a: As in `coupling_mix`.
        c: As in `coupling_mix`.
        b: As in `coupling_mix`.
        g: As in `coupling_mix`.
        scale: As in `coupling_vjp`.
        eps_dtype: As in `coupling_vjp`.

    Returns:
        The cotangents of target, source and eps. That of source does not contain what the network's own backward pass
        adds to it. That of eps is None if `eps_dtype` is.

    Raises:
        ValueError: Shapes or devices do not fit together.
        TypeError: A dtype does not fit.
    """
    if is_plain(grad_target, grad_source, scale):
        return _coupling_mix_vjp_forward(grad_target, grad_source, *mixing, a, c, b, g, scale, eps_dtype)
    if needs_formula(grad_target, grad_source, scale):
        call = COUPLING_MIX_VJP.call(grad_target, grad_source, *mixing, a, c, b, g, scale, eps_dtype)
        return _coupling_mix_vjp_formula(call)
    outs = registered.coupling_mix_vjp(grad_target, grad_source, *mixing, a, c, b, g, scale, eps_dtype)
    return outs[0], outs[1], outs[2] if eps_dtype is not None else None


# From tensors of any layout to a backend's kernel


def _coupling_mix_forward(
    target: Tensor, source: Tensor, eps: Tensor | None, *numbers: Any, out: Pair | None = None
) -> Pair:
    """Checks the operands, brings them to one layout and calls the kernel. numbers: the mixing, then a, c, b, g."""
    *others, b, g = numbers
    check_operands(target, source, eps, g)
    layout = dense_format(target)
    if out is None:
        out = torch.empty_like(target, memory_format=layout), torch.empty_like(target, memory_format=layout)
    if target.numel():
        select("coupling_mix", target)(
            *out,
            target.contiguous(memory_format=layout),
            source.contiguous(memory_format=layout),
            None if eps is None or b == 0 else eps.contiguous(memory_format=layout),
            *others,
            b,
            None if b == 0 else g,
        )
    return out


def _coupling_mix_fake(call: Any) -> Pair:
    """Returns the outputs of `_coupling_mix_forward` without their values."""
    check_operands(call.target, call.source, call.eps, call.g)
    layout = dense_format(call.target)
    return torch.empty_like(call.target, memory_format=layout), torch.empty_like(call.target, memory_format=layout)


def _coupling_mix_vjp_forward(grad_target: Tensor, grad_source: Tensor, *rest: Any) -> Cotangents:
    """Calls the kernel as above. rest: the mixing, then a, c, b, g, then scale and eps_dtype."""
    *numbers, scale, eps_dtype = rest
    check_floating(grad_target=grad_target)
    check_same("grad_target", grad_target, grad_source=grad_source)
    outs = _new_cotangents(grad_target, numbers[-1], eps_dtype)
    if grad_target.numel():
        layout = dense_format(grad_target)
        select("coupling_mix_vjp", grad_target)(
            *outs,
            grad_target.contiguous(memory_format=layout),
            grad_source.contiguous(memory_format=layout),
            prepared_scale(scale, grad_target, eps_dtype),
            *numbers,
        )
    return outs


def _new_cotangents(grad: Tensor, g: float | None, eps_dtype: torch.dtype | None) -> Cotangents:
    """Returns uninitialised tensors for the cotangents that are wanted."""
    layout = dense_format(grad)
    to_target, to_source = (torch.empty_like(grad, memory_format=layout) for _ in range(2))
    return to_target, to_source, new_eps(grad, eps_dtype, g, layout)


# The arithmetic in plain torch operations, which the eager kernels and the formulas share


def _times(value: Tensor, factor: float) -> Tensor:
    """Returns the product, without a multiplication by one."""
    return value if factor == 1 else value * factor


def _plus(value: Tensor, other: Tensor, factor: float) -> Tensor:
    """Returns `value + factor other`, without a term whose factor is zero in the dtype of the arithmetic."""
    return value if vanishes(factor, value.dtype) else value + other * factor


def _mixing(call: Any) -> Mixing:
    """Returns the mixing in the arguments of a call."""
    return Mixing(call.target_first, call.a0, call.c0, call.a1, call.c1)


def _coupled_and_mixed(call: Any, eps: Tensor | None) -> Pair:
    """Returns target and source after the coupling and the mixing, in the dtype of the arithmetic."""
    dtype = compute_dtype(call.target.dtype, call.target.dtype if eps is None else eps.dtype)
    mixing, source = _mixing(call), call.source.to(dtype)
    target = moved(call.target, source if call.c else None, eps, (call.a, call.c, call.b), call.g, dtype)
    first, second = (target, source) if mixing.target_first else (source, target)
    first = _plus(_times(first, mixing.a0), second, mixing.c0)
    second = _plus(_times(second, mixing.a1), first, mixing.c1)
    return (first, second) if mixing.target_first else (second, first)


def _transposed(grad_target: Tensor, grad_source: Tensor, mixing: Mixing) -> Pair:
    """Returns the cotangents before the mixing, from those after it."""
    first, second = (grad_target, grad_source) if mixing.target_first else (grad_source, grad_target)
    first = _plus(first, second, mixing.c1)
    second = _plus(_times(second, mixing.a1), first, mixing.c0)
    first = _times(first, mixing.a0)
    return (first, second) if mixing.target_first else (second, first)


def _coupling_mix_formula(call: Any) -> Pair:
    """Returns the results by operations that can be transformed and differentiated in any mode."""
    check_operands(call.target, call.source, call.eps, call.g)
    results = _coupled_and_mixed(call, None if call.b == 0 else call.eps)
    new = (cast(result, call.target.dtype) for result in results)
    first, second = (result.clone() if result is call.target or result is call.source else result for result in new)
    return first, second


def _coupling_mix_vjp_formula(call: Any) -> Cotangents:
    """Returns the cotangents by operations that can be transformed and differentiated in any mode."""
    check_floating(grad_target=call.grad_target)
    check_same("grad_target", call.grad_target, grad_source=call.grad_source)
    narrow, eps_dtype = call.grad_target.dtype, call.eps_dtype
    dtype = compute_dtype(narrow, narrow if eps_dtype is None else eps_dtype)
    scale = prepared_scale(call.scale, call.grad_target, eps_dtype)
    target, source = _transposed(call.grad_target.to(dtype), call.grad_source.to(dtype), _mixing(call))
    to_eps = None if eps_dtype is None else eps_formula(target * call.b, scale, call.g, eps_dtype)
    return cast(_times(target, call.a), narrow), cast(_plus(source, target, call.c), narrow), to_eps


# The eager kernels


@eager(COUPLING_MIX)
def _coupling_mix_eager(call: Any) -> None:
    """Fills `out_target` and `out_source`."""
    target, source = _coupled_and_mixed(call, call.eps)
    store(call.out_target, target)
    store(call.out_source, source)


@eager(COUPLING_MIX_VJP)
def _coupling_mix_vjp_eager(call: Any) -> None:
    """Fills `out_target` and `out_source`, and `out_eps` if it is not None."""
    narrow = call.grad_target.dtype
    dtype = compute_dtype(narrow, narrow if call.out_eps is None else call.out_eps.dtype)
    target, source = _transposed(call.grad_target.to(dtype), call.grad_source.to(dtype), _mixing(call))
    if call.out_eps is not None:
        cotangent = target * call.b
        store_eps(call.out_eps, cotangent if call.scale is None else cotangent * call.scale, call.g)
    store(call.out_source, _plus(source, target, call.c))
    store(call.out_target, _times(target, call.a))


# Gradient and registration


def _remember(ctx: Any, call: Any, _: Any) -> None:
    """Keeps what the backward pass of `coupling_mix` needs."""
    ctx.mixing = _mixing(call)
    ctx.coefficients = call.a, call.c, call.b, call.g
    ctx.eps_dtype = None if call.eps is None else call.eps.dtype


def _gradient(ctx: Any, grad_target: Tensor, grad_source: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the cotangents of target, source and eps."""
    needs_target, needs_source, needs_eps, *_ = ctx.needs_input_grad
    a, c, b, g = ctx.coefficients
    to_target, to_source, to_eps = coupling_mix_vjp(
        grad_target, grad_source, ctx.mixing, a, c, b, g, eps_dtype=ctx.eps_dtype if needs_eps else None
    )
    return to_target if needs_target else None, to_source if needs_source else None, to_eps


register(COUPLING_MIX, _coupling_mix_forward, _coupling_mix_fake, remember=_remember, gradient=_gradient)
register(
    COUPLING_MIX_VJP,
    _coupling_mix_vjp_forward,
    lambda call: _new_cotangents(call.grad_target, call.g, call.eps_dtype),
)
