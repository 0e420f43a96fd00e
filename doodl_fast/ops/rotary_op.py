"""Rotary position embeddings (RoPE, Su et al., arXiv 2104.09864) of queries or keys, and the gradient of their input.

    y = x cos + rotated(x) sin

rotated(x) turns each pair of channels (a, b) into (-b, a). Pairs are neighbours, channels 2 i and 2 i + 1, or lie in
the two halves of a head, i and i + D / 2. cos and sin are tables with a row for each token, which all heads share. The
gradient follows from the tables alone, so nothing of x is kept.

Arithmetic: it is done in float64 for float64, else in float32, with a rounding after each product and no fused
multiply-add. The gradient's two terms, g cos and g sin, are rounded to x's dtype before they are added, as autograd
does for the two uses of x. These are the operations of diffusers' `apply_rotary_emb`, so all backends have its bits.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .backends.registry import eager, select
from .layout import check_floating, check_same, compute_dtype, store
from .matching import compared
from .registration import register, registered
from .signatures import ROTARY_EMBEDDING, ROTARY_EMBEDDING_BACKWARD
from .transforms import cast, is_plain, is_transformed, needs_formula

PAIRS = ("adjacent", "halves")
"""Where the two channels of a pair are, by the numbers that the registered ops take."""

# The public functions


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, pairs: str = "adjacent") -> Tensor:
    """Rotates each pair of channels by the angle of its token, in one op.

    Args:
        x: Queries or keys (B, S, H, D) of B samples, S tokens, H heads and an even number D of channels, in float16,
            bfloat16, float32 or float64. A contiguous tensor is used in place.
        cos: The cosines (S, D), or (B, S, D) if samples have their own, in any of these dtypes, but in float64 for
            a float64 x alone. No gradient of the tables is given.
        sin: The sines, of the same shape and dtype.
        pairs: "adjacent" for channels 2 i and 2 i + 1 (diffusers' `use_real_unbind_dim=-1`), "halves" for channels i
            and i + D / 2 (-2).

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: Shapes or devices do not fit together, a gradient of a table is wanted, or there are no such pairs.
        TypeError: A dtype does not fit.

    Example:
        >>> query = ops.rotary_embedding(query, *image_rotary_emb)  # FLUX
    """
    kind = _kind(pairs)
    _refuse_gradients(cos, sin)
    if is_plain(x, cos, sin):
        return _forward(x, cos, sin, kind)
    if is_transformed(x, cos, sin):
        return _formula(ROTARY_EMBEDDING.call(x, cos, sin, kind))
    result: Tensor = registered.rotary_embedding(x, cos, sin, kind)
    return result


def rotary_embedding_backward(grad_y: Tensor, cos: Tensor, sin: Tensor, pairs: str = "adjacent") -> Tensor:
    """Computes the gradient of the input of `rotary_embedding`.

    Args:
        grad_y: The gradient of y, a tensor (B, S, H, D).
        cos: As in `rotary_embedding`.
        sin: As in `rotary_embedding`.
        pairs: As in `rotary_embedding`.

    Returns:
        The gradient of x, a contiguous tensor of grad_y's shape and dtype.

    Raises:
        ValueError: As in `rotary_embedding`.
        TypeError: A dtype does not fit.
    """
    kind = _kind(pairs)
    _refuse_gradients(cos, sin)
    if is_plain(grad_y, cos, sin):
        return _backward(grad_y, cos, sin, kind)
    if needs_formula(grad_y, cos, sin):
        return _backward_formula(ROTARY_EMBEDDING_BACKWARD.call(grad_y, cos, sin, kind))
    result: Tensor = registered.rotary_embedding_backward(grad_y, cos, sin, kind)
    return result


@compared("rotary_embedding")
def _same_bits() -> bool:
    """Whether values and gradients have the bits of PyTorch's operators for a few tensors, with both kinds of pairs."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for batch, tokens, heads, size in ((1, 1, 1, 2), (2, 3, 2, 6), (1, 37, 3, 34), (2, 101, 5, 64)):
        shape = (batch, tokens, heads, size)
        draws = [torch.randn(shape, generator=generator, device="cpu") for _ in range(2)]
        cos, sin = (torch.randn(tokens, size, generator=generator, device="cpu") for _ in range(2))
        for dtype, kind in itertools.product(dtypes, range(len(PAIRS))):
            x, grad = (z.to(dtype) for z in draws)
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                want = _by_operators(leaf, cos, sin, kind)
                (want_grad,) = torch.autograd.grad(want, leaf, grad)
            got, got_grad = _forward(x, cos, sin, kind), _backward(grad, cos, sin, kind)
            if not (torch.equal(got, want) and torch.equal(got_grad, want_grad)):
                return False
    return True


def _by_operators(x: Tensor, cos: Tensor, sin: Tensor, kind: int) -> Tensor:
    """The same by the operators that diffusers calls, for a tensor in float32 or half precision."""
    cos, sin = (table[None, :, None] for table in (cos, sin))
    return (x.float() * cos + _rotated(x, kind).float() * sin).to(x.dtype)


# From tensors of any layout to a backend's kernel


def _kind(pairs: str) -> int:
    """Returns the number of a kind of pairs."""
    if pairs not in PAIRS:
        raise ValueError(f"pairs: expected one of {', '.join(map(repr, PAIRS))}, got {pairs!r}")
    return PAIRS.index(pairs)


def _refuse_gradients(cos: Tensor, sin: Tensor) -> None:
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos, sin: expected tables of which no gradient is wanted, as the op gives none; detach them")


def _check(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError or TypeError, which names the argument, if the operands do not fit together."""
    check_floating(**{name: x}, cos=cos, sin=sin)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"{name}: expected a tensor (B, S, H, D) with an even D, got the shape {tuple(x.shape)}")
    batch, tokens, _, size = x.shape
    if cos.shape not in ((tokens, size), (batch, tokens, size)):
        raise ValueError(
            f"cos: expected the shape {(tokens, size)} or {(batch, tokens, size)} of a table of {name}'s tokens, "
            f"got {tuple(cos.shape)}"
        )
    check_same("cos", cos, sin=sin)
    if cos.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(f"cos: expected fp16, bf16 or fp32 with {name} in {x.dtype}, got fp64; round the tables first")
    if cos.device != x.device:
        raise ValueError(f"cos: expected {name}'s device {x.device}, got {cos.device}")


def _tables(x: Tensor, *tables: Tensor) -> list[Tensor]:
    """Returns tables as the kernels take them: contiguous, in the dtype of the arithmetic."""
    dtype = compute_dtype(x.dtype)
    return [table.to(dtype).contiguous() for table in tables]


def _forward(x: Tensor, cos: Tensor, sin: Tensor, kind: int) -> Tensor:
    """Checks the operands, makes them contiguous and calls the backend's kernel."""
    _check("x", x, cos, sin)
    out = x.new_empty(x.shape)
    if out.numel():
        select("rotary_embedding", x)(out, x.contiguous(), *_tables(x, cos, sin), kind)
    return out


def _backward(grad_y: Tensor, cos: Tensor, sin: Tensor, kind: int) -> Tensor:
    """Checks the operands, makes them contiguous and calls the backend's kernel."""
    _check("grad_y", grad_y, cos, sin)
    out = grad_y.new_empty(grad_y.shape)
    if out.numel():
        kernel = select("rotary_embedding_backward", grad_y)
        kernel(out, grad_y.contiguous(), *_tables(grad_y, cos, sin), kind)
    return out


def _output(call: Any) -> Tensor:
    """Checks the operands and returns an uninitialised tensor for y."""
    _check("x", call.x, call.cos, call.sin)
    result: Tensor = call.x.new_empty(call.x.shape)
    return result


def _backward_output(call: Any) -> Tensor:
    """Checks the operands and returns an uninitialised tensor for the gradient of x."""
    _check("grad_y", call.grad_y, call.cos, call.sin)
    result: Tensor = call.grad_y.new_empty(call.grad_y.shape)
    return result


# The arithmetic in plain torch operations, which the eager kernels and the formulas share


def _rotated(x: Tensor, kind: int) -> Tensor:
    """Returns (-b, a) for each pair of channels (a, b)."""
    if kind == 0:
        a, b = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
        return torch.stack([-b, a], -1).reshape(x.shape)
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _spread(x: Tensor, *tables: Tensor) -> list[Tensor]:
    """Returns tables for all samples and heads of x, in the dtype of the arithmetic."""
    dtype = compute_dtype(x.dtype)
    return [(table if table.ndim == 3 else table[None]).to(dtype)[:, :, None] for table in tables]


def _value(call: Any) -> Tensor:
    """Returns y in the dtype of the arithmetic."""
    cos, sin = _spread(call.x, call.cos, call.sin)
    # Each use of x is converted for itself, so that a derivative is rounded for each, as the gradient is.
    return call.x.to(cos.dtype) * cos + _rotated(call.x, call.pairs).to(cos.dtype) * sin


def _gradient_value(call: Any) -> Tensor:
    """Returns the gradient of x in the dtype of the arithmetic."""
    cos, sin = _spread(call.grad_y, call.cos, call.sin)
    grad, dtype = call.grad_y.to(cos.dtype), call.grad_y.dtype
    along, across = (cast(grad * table, dtype).to(cos.dtype) for table in (cos, sin))
    return along - _rotated(across, call.pairs)


def _formula(call: Any) -> Tensor:
    """Returns y by operations that can be transformed and differentiated in any mode."""
    _output(call)
    return cast(_value(call), call.x.dtype)


def _backward_formula(call: Any) -> Tensor:
    """Returns the gradient of x by operations that can be transformed and differentiated in any mode."""
    _backward_output(call)
    return cast(_gradient_value(call), call.grad_y.dtype)


# The eager kernels


@eager(ROTARY_EMBEDDING)
def _eager(call: Any) -> None:
    """Fills y."""
    store(call.y, _value(call))


@eager(ROTARY_EMBEDDING_BACKWARD)
def _backward_eager(call: Any) -> None:
    """Fills grad_x."""
    store(call.grad_x, _gradient_value(call))


# Gradient and registration


def _remember(ctx: Any, call: Any, _: Tensor) -> None:
    """Keeps what the backward pass needs."""
    ctx.save_for_backward(call.cos, call.sin)
    ctx.pairs = PAIRS[call.pairs]


def _gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor]:
    """Returns the gradient of x."""
    cos, sin = ctx.saved_tensors
    return (rotary_embedding_backward(grad_y, cos, sin, ctx.pairs),)


register(ROTARY_EMBEDDING, _forward, _output, remember=_remember, gradient=_gradient)
register(ROTARY_EMBEDDING_BACKWARD, _backward, _backward_output)
