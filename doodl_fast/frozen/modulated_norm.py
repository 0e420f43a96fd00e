"""LayerNorm with its modulation, and RMSNorm, as one op, where that changes no bit or makes the result more exact.

The adaptive norms of diffusion transformers end with `norm(x) * (1 + scale) + shift`, for which PyTorch reads and
writes the tensor three times, and twice more in the backward pass. RMSNorm as diffusers writes it takes more passes
still. The op `ops.modulated_norm` takes one, forward and backward, and keeps as little.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..ops.transforms import is_plain
from . import level
from .functions import entered
from .recipes import load, recipe_of, remember, save

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MOST = 2**13
"""Rows of more channels do not fit into the registers of Triton's kernel."""


class _Norm(torch.autograd.Function):
    """The op, which keeps x, or what x follows from, and the statistics of the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Any, *rest: Any) -> Tensor:
        *vectors, eps, center = rest
        weight, bias, scale, shift = map(_tensor, vectors)
        y, mean, rstd = ops.modulated_norm(x, weight, bias, scale, shift, eps, center)
        ctx.there = [z is not None for z in vectors]
        save(ctx, kept, mean, rstd, *(z for z in vectors if z is not None))
        ctx.eps, ctx.center, ctx.backend = eps, center, ops.choice()
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, mean, rstd, *given) = grad_outputs, load(ctx)
        found = iter(given)
        vectors: list[Any] = [next(found) if there else None for there in ctx.there]
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:6])
        if torch.is_grad_enabled():  # A second derivative needs the way back to x.
            wanted = [z for z, need in zip((x, *vectors[2:]), needs, strict=True) if need]
            y = _by_operators(x, vectors, ctx.eps, ctx.center)
            gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            of_x, of_scale, of_shift = (next(gradients) if need else None for need in needs)
            return of_x, None, None, None, of_scale, of_shift, None, None
        weight, bias, scale, _ = map(_tensor, vectors)
        tokens, of_x, of_scale = tuple(range(1, x.ndim - 1)), None, None
        with entered(ctx.backend):
            if needs[0]:
                of_x = ops.modulated_norm_backward(grad, x, mean, rstd, weight, scale, ctx.center)
            if needs[1]:
                norm = ops.modulated_norm(x, weight, bias, None, None, ctx.eps, ctx.center)[0]
                of_scale = (grad * norm).sum(tokens) if tokens else grad * norm
        of_shift = (grad.sum(tokens) if tokens else grad) if needs[2] else None
        return of_x, None, None, None, of_scale, of_shift, None, None


def _by_operators(x: Tensor, vectors: list[Any], eps: float, center: bool) -> Tensor:
    """The same by PyTorch's operators, which have derivatives of any order."""
    weight, bias, scale, shift = vectors
    along = (len(x), *[1] * (x.ndim - 2), -1)
    if center:
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + scale.reshape(along))
    return y if shift is None else y + shift.reshape(along)


def _tensor(vector: Tensor | None) -> Tensor | None:
    """A vector as a plain tensor without a graph, which the op's kernels are called with directly."""
    return vector if vector is None or (type(vector) is Tensor and not vector.requires_grad) else vector.detach()


def _again(backend: str, *args: Any) -> Tensor:
    """The norm again, by the backend that has computed it."""
    with entered(backend):
        return ops.modulated_norm(*args)[0]


def _norm(x: Tensor, *rest: Any, recipe: bool) -> Tensor:
    """Calls the op. rest: weight, bias, scale, shift, eps, center. recipe: whether the result carries a recipe."""
    wanted = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in rest[2:4])
    if not wanted and not (torch.is_grad_enabled() and x.requires_grad):
        weight, bias, scale, shift = map(_tensor, rest[:4])
        return ops.modulated_norm(x, weight, bias, scale, shift, *rest[4:])[0]
    y: Tensor = _Norm.apply(x, recipe_of(x) or x, *rest)  # type: ignore[no-untyped-call]
    if not recipe or wanted:
        return y
    return remember(y, functools.partial(_again, ops.choice()), x, *map(_tensor, rest[:4]), *rest[4:])


def _is_used(x: Any, vectors: tuple[Tensor | None, ...]) -> bool:
    """Whether the op may be called for an input and the vectors of a norm."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.ndim >= 2
        and x.dtype in _DTYPES
        and x.numel() >= level.SMALL_NORM  # At every level: what is computed must depend on the input alone.
        and all(z is None or (z.dtype == x.dtype and not z.requires_grad) for z in vectors)
        and not _has_any_global_hook()
        and not torch._C._is_any_autocast_enabled()
        and is_plain()
    )


def _pays(x: Tensor, same_bits: bool) -> bool:
    """Whether the op is faster than PyTorch's operators, and on a CPU has their bits.

    same_bits: Whether values and gradients have the bits of PyTorch where `ops.matches_torch` says so.
    """
    if x.is_cuda:
        return x.shape[-1] <= MOST and ops.has_kernel("modulated_norm", x)
    fits = same_bits and x.is_cpu and x.dtype == torch.float32 and x.shape[-1] % 8 == 0
    return fits and ops.matches_torch("modulated_norm")


# Adaptive norms: LayerNorm, and a modulation by an embedding


def _is_untouched(norm: Any) -> bool:
    """Whether a norm inside of a layer is PyTorch's LayerNorm of the last dimension, without hooks."""
    cls = type(norm)
    return (
        f"{cls.__module__}.{cls.__qualname__}" == "torch.nn.modules.normalization.LayerNorm"
        and len(norm.normalized_shape) == 1
        and "forward" not in norm.__dict__
        and not any(getattr(norm, name) for name in _HOOKS)
    )


def _embedding(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The embedding that a layer is called with, or None if it is called in another way than diffusers' blocks do."""
    if len(args) == 1 and kwargs.keys() == {"emb"}:
        return kwargs["emb"]
    # The second argument of AdaLayerNormZero is a timestep.
    return args[1] if len(args) == 2 and not kwargs and type(layer).__name__ != "AdaLayerNormZero" else None


def _parts(layer: Any, x: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
    """The vectors that a layer makes of an embedding, with shift and scale first."""
    name = type(layer).__name__
    if name == "AdaLayerNormContinuous":
        scale, shift = layer.linear(layer.silu(embedding).to(x.dtype)).chunk(2, dim=1)
        return shift, scale
    number = {"AdaLayerNormZero": 6, "AdaLayerNormZeroSingle": 3, "SD35AdaLayerNormZeroX": 9}[name]
    parts: tuple[Tensor, ...] = layer.linear(layer.silu(embedding)).chunk(number, dim=1)
    return parts


def adaptive(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: bool) -> Any:
    """The result of one of diffusers' adaptive norms by the op, or None if the layer's own operators are used.

    Args:
        layer: An AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous or SD35AdaLayerNormZeroX.
        args: What the layer is called with.
        kwargs: What the layer is called with by name.
        recipe: Whether the result is to carry a recipe.
    """
    embedding, norm, twice = _embedding(layer, args, kwargs), layer.norm, type(layer).__name__[:4] == "SD35"
    if type(embedding) is not Tensor or getattr(layer, "emb", None) is not None or not _is_untouched(norm):
        return None
    x, weights = args[0], (norm.weight, norm.bias)
    # Two modulations of one norm have two gradients, whose sum has other bits than PyTorch's.
    if (
        not _is_used(x, weights)
        or embedding.dtype != x.dtype
        or not x.is_contiguous()
        or not _pays(x, same_bits=not twice)
    ):
        return None
    shift, scale, *rest = _parts(layer, x, embedding)
    if scale.dtype != x.dtype or len(scale) != len(x):
        return None

    def modulated(shift: Tensor, scale: Tensor) -> Tensor:
        return _norm(x, *weights, scale, shift, norm.eps, True, recipe=recipe)

    if twice:
        return modulated(shift, scale), *rest[:4], modulated(rest[4], rest[5]), rest[6]
    y = modulated(shift, scale)
    return (y, *rest) if rest else y


# RMSNorm


def root_mean_square(layer: Any, x: Any) -> Tensor | None:
    """The result of PyTorch's or diffusers' RMSNorm by the op, or None if the layer's own operators are used.

    On a CPU it is None: there the op rounds in another way than the operators that the layers are written in.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    shape = tuple(getattr(layer, "normalized_shape", None) or layer.dim)
    if layer.eps is None or not _is_used(x, (weight, bias)) or shape != x.shape[-1:] or not _pays(x, same_bits=False):
        return None
    return _norm(x, weight, bias, None, None, layer.eps, False, recipe=True)
