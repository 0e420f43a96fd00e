"""A coupling and the two mixing couplings after it in one pass, its vector-Jacobian product, and the mixing alone.

EDICT (arXiv 2211.12446) ends every step with `x <- p x + (1-p) y`, `y <- p y + (1-p) x`, which need no network. With
t the coupling's target and s its source:

    t1 = a t + c s + b eps                                       (`coupling`, eps guided or not)
    target first:   t2 = a0 t1 + c0 s ;   s2 = a1 s + c1 t2
    source first:   s2 = a0 s + c0 t1 ;   t2 = a1 t1 + c1 s2

With eps = None it is the mixing alone, and the mixing's inverse is again such a pair, in the opposite order
(`mix_inverse`): a network call stands between it and the inverse of the coupling.

Arithmetic. The dtype and the rule for multiply-adds are those of `coupling`; t1, t2 and s2 stay in the dtype of the
arithmetic until each output is rounded once. In this order, `.` a rounding:

    mixing   first = a0.f ;  first = first + c0.o ;  second = a1.o ;  second = second + c1.first
    vjp      f = gf + c1.go ;  o = a1.go ;  o = o + c0.f ;  f = a0.f           (the mixing's transpose, f the one mixed
    first)
             gt1, gs = f, o or o, f ;  q = (b.gt1).scale ;  out_s = gs + c.gt1 ;  out_t = a.gt1 ;  eps's as in
             `coupling`

Terms whose coefficient is zero in the dtype of the arithmetic, or whose factor is one, are left out. Shapes and layouts
as in `coupling`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.registry import backend, choice, eager, select
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
from .transforms import cast, is_plain, is_transformed, needs_formula, refuse_tangents


class Mixing(NamedTuple):
    """Two couplings without a network: the first changes t (or s), the second the other.

    target_first: whether the first one's target is t, the coupling's own target. a0, c0 and a1, c1: their coefficients.
    """

    target_first: bool
    a0: float
    c0: float
    a1: float
    c1: float

    def inverse(self) -> Mixing:
        """The pair that undoes this one. Raises ZeroDivisionError when a0 or a1 is 0."""
        return Mixing(not self.target_first, 1 / self.a1, -self.c1 / self.a1, 1 / self.a0, -self.c0 / self.a0)


Pair = tuple[Tensor, Tensor]

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
    """`coupling`, then the mixing: (target, source) after both; differentiable in its tensors.

    target, source: (B, ...) of one dtype. eps: (B, ...), or (2B, ...) = [uncond; cond] when g is given, or None.
    out: the pair of tensors that the results are written into, else new ones; otherwise as in `coupling`.
    Raises ValueError or TypeError, naming the argument.
    """
    outs: tuple[Tensor, ...] = () if out is None else tuple(out)
    if out is not None:
        check_out(target, dict(zip(("out[0]", "out[1]"), out, strict=True)), (target, source, eps))
    if is_plain(target, source, eps, *outs):
        return _coupling_mix_forward(target, source, eps, *mixing, a, c, b, g, out=out)
    if is_transformed(target, source, eps, *outs):
        if out is not None:
            raise ValueError("out: expected None under forward-mode differentiation and torch.func's transforms")
        return _coupling_mix_formula(target, source, eps, mixing, (a, c, b), g)
    pair: Pair = torch.ops.doodl_fast.coupling_mix(target, source, eps, *mixing, a, c, b, g)
    return pair if out is None else (out[0].copy_(pair[0]), out[1].copy_(pair[1]))


def mix(target: Tensor, source: Tensor, mixing: Mixing) -> Pair:
    """The mixing alone: new (target, source)."""
    return coupling_mix(target, source, None, mixing)


def mix_inverse(target: Tensor, source: Tensor, mixing: Mixing) -> Pair:
    """Undoes `mix`, up to rounding."""
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The vector-Jacobian product of `coupling_mix`: the cotangents of target, source and eps.

    grad_target, grad_source: (B, ...) of one dtype. scale, eps_dtype: as in `coupling_vjp`.
    The source's is without what comes back through the network; eps's is None when eps_dtype is.
    """
    if is_plain(grad_target, grad_source, scale):
        return _coupling_mix_vjp_forward(grad_target, grad_source, *mixing, a, c, b, g, scale, eps_dtype)
    if needs_formula(grad_target, grad_source, scale):
        return _coupling_mix_vjp_formula(grad_target, grad_source, mixing, (a, c, b), g, scale, eps_dtype)
    outs = torch.ops.doodl_fast.coupling_mix_vjp(grad_target, grad_source, *mixing, a, c, b, g, scale, eps_dtype)
    return outs[0], outs[1], outs[2] if eps_dtype is not None else None


# From tensors of any layout to a backend's kernel


def _coupling_mix_forward(
    target: Tensor, source: Tensor, eps: Tensor | None, *numbers: Any, out: Pair | None = None
) -> Pair:
    """numbers: those of the mixing, then a, c, b, g."""
    *others, b, g = numbers
    check_operands(target, source, eps, g)
    refuse_tangents("coupling_mix", target, source, eps)
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


def _coupling_mix_vjp_forward(
    grad_target: Tensor, grad_source: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """rest: the numbers of the mixing, then a, c, b, g, then scale and eps_dtype."""
    *numbers, scale, eps_dtype = rest
    check_floating(grad_target=grad_target)
    check_same("grad_target", grad_target, grad_source=grad_source)
    refuse_tangents("coupling_mix_vjp", grad_target, grad_source, scale)
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


def _new_cotangents(
    grad: Tensor, g: float | None, eps_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    layout = dense_format(grad)
    to_target, to_source = (torch.empty_like(grad, memory_format=layout) for _ in range(2))
    return to_target, to_source, new_eps(grad, eps_dtype, g, layout)


# The reference kernels


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor


def _plus(value: Tensor, other: Tensor, factor: float) -> Tensor:
    return value if vanishes(factor, value.dtype) else value + other * factor


def _coupled_and_mixed(
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    mixing: Mixing,
    coefficients: tuple[float, float, float],
    g: float | None,
) -> Pair:
    """Target and source after the coupling and the mixing, in the dtype of the arithmetic."""
    dtype = compute_dtype(target.dtype, target.dtype if eps is None else eps.dtype)
    source = source.to(dtype)
    target = moved(target, source if coefficients[1] else None, eps, coefficients, g, dtype)
    first, second = (target, source) if mixing.target_first else (source, target)
    first = _plus(_times(first, mixing.a0), second, mixing.c0)
    second = _plus(_times(second, mixing.a1), first, mixing.c1)
    return (first, second) if mixing.target_first else (second, first)


def _transposed(grad_target: Tensor, grad_source: Tensor, mixing: Mixing) -> Pair:
    """The cotangents before the mixing, from those after it."""
    first, second = (grad_target, grad_source) if mixing.target_first else (grad_source, grad_target)
    first = _plus(first, second, mixing.c1)
    second = _plus(_times(second, mixing.a1), first, mixing.c0)
    first = _times(first, mixing.a0)
    return (first, second) if mixing.target_first else (second, first)


def _coupling_mix_formula(
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    mixing: Mixing,
    coefficients: tuple[float, float, float],
    g: float | None,
) -> Pair:
    """The op in plain torch operations, which can be transformed and differentiated in any mode."""
    check_operands(target, source, eps, g)
    eps = None if coefficients[2] == 0 else eps
    results = _coupled_and_mixed(target, source, eps, mixing, coefficients, g)
    new = (cast(result, target.dtype) for result in results)
    first, second = (result.clone() if result is target or result is source else result for result in new)
    return first, second


def _coupling_mix_vjp_formula(
    grad_target: Tensor,
    grad_source: Tensor,
    mixing: Mixing,
    coefficients: tuple[float, float, float],
    g: float | None,
    scale: Tensor | None,
    eps_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The vector-Jacobian product in plain torch operations."""
    check_floating(grad_target=grad_target)
    check_same("grad_target", grad_target, grad_source=grad_source)
    a, c, b = coefficients
    narrow = grad_target.dtype
    dtype = compute_dtype(narrow, narrow if eps_dtype is None else eps_dtype)
    scale = prepared_scale(scale, grad_target, eps_dtype)
    target, source = _transposed(grad_target.to(dtype), grad_source.to(dtype), mixing)
    to_eps = None if eps_dtype is None else eps_formula(target * b, scale, g, eps_dtype)
    return cast(_times(target, a), narrow), cast(_plus(source, target, c), narrow), to_eps


@eager
def _coupling_mix(
    out_target: Tensor,
    out_source: Tensor,
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    target_first: bool,
    a0: float,
    c0: float,
    a1: float,
    c1: float,
    a: float,
    c: float,
    b: float,
    g: float | None,
) -> None:
    mixing = Mixing(target_first, a0, c0, a1, c1)
    results = _coupled_and_mixed(target, source, eps, mixing, (a, c, b), g)
    store(out_target, results[0])
    store(out_source, results[1])


@eager
def _coupling_mix_vjp(
    to_target: Tensor,
    to_source: Tensor,
    to_eps: Tensor | None,
    grad_target: Tensor,
    grad_source: Tensor,
    scale: Tensor | None,
    target_first: bool,
    a0: float,
    c0: float,
    a1: float,
    c1: float,
    a: float,
    c: float,
    b: float,
    g: float | None,
) -> None:
    dtype = compute_dtype(grad_target.dtype, grad_target.dtype if to_eps is None else to_eps.dtype)
    mixing = Mixing(target_first, a0, c0, a1, c1)
    grad_target, grad_source = _transposed(grad_target.to(dtype), grad_source.to(dtype), mixing)
    if to_eps is not None:
        cotangent = grad_target * b
        store_eps(to_eps, cotangent if scale is None else cotangent * scale, g)
    store(to_source, _plus(grad_source, grad_target, c))
    store(to_target, _times(grad_target, a))


# Registration

_MIXING = "bool target_first, float a0, float c0, float a1, float c1, "


_coupling_mix_op = torch.library.custom_op(
    "doodl_fast::coupling_mix",
    mutates_args=(),
    schema=f"(Tensor target, Tensor source, Tensor? eps, {_MIXING}float a, float c, float b, float? g)"
    " -> (Tensor, Tensor)",
)(_coupling_mix_forward)


@_coupling_mix_op.register_fake
def _(target: Tensor, source: Tensor, eps: Tensor | None, *numbers: Any) -> Pair:
    check_operands(target, source, eps, numbers[-1])
    layout = dense_format(target)
    return torch.empty_like(target, memory_format=layout), torch.empty_like(target, memory_format=layout)


@torch.library.custom_op(
    "doodl_fast::coupling_mix_vjp",
    mutates_args=(),
    schema=f"(Tensor grad_target, Tensor grad_source, {_MIXING}float a, float c, float b, float? g, Tensor? scale, "
    "ScalarType? eps_dtype) -> Tensor[]",
)
def _coupling_mix_vjp_op(*arguments: Any) -> list[Tensor]:
    return [out for out in _coupling_mix_vjp_forward(*arguments) if out is not None]


@_coupling_mix_vjp_op.register_fake
def _(grad_target: Tensor, grad_source: Tensor, *rest: Any) -> list[Tensor]:
    *_, g, _, eps_dtype = rest
    return [out for out in _new_cotangents(grad_target, g, eps_dtype) if out is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    eps = inputs[2]
    ctx.mixing = Mixing(*inputs[3:8])
    ctx.coefficients = inputs[8:]
    ctx.eps_dtype = None if eps is None else eps.dtype
    ctx.backend = choice()  # autograd may run the backward pass in a thread of its own, which has no context


def _backward(ctx: Any, grad_target: Tensor, grad_source: Tensor) -> tuple[Tensor | None, ...]:
    needs_target, needs_source, needs_eps, *_ = ctx.needs_input_grad
    a, c, b, g = ctx.coefficients
    with backend(ctx.backend):
        to_target, to_source, to_eps = coupling_mix_vjp(
            grad_target, grad_source, ctx.mixing, a, c, b, g, eps_dtype=ctx.eps_dtype if needs_eps else None
        )
    return to_target if needs_target else None, to_source if needs_source else None, to_eps, *[None] * 9


_coupling_mix_op.register_autograd(_backward, setup_context=_setup)
