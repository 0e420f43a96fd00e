"""Rotary embeddings of queries and keys (RoPE, Su et al., arXiv 2104.09864) as one op, where that changes no bit.

diffusers writes them as some ten operators, each of which reads and writes the tensor, some of them in float32. The op
`ops.rotary_embedding` takes one pass, forward and backward. Autograd keeps nothing of the tensor in either way.

The attention processors call a function of diffusers for this, which is no layer. So the copied attention layers of a
run get copies of their processors, whose `__call__` has the same code and another function under that name. diffusers'
own modules and the caller's processors are not changed.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.transforms import is_plain
from . import level
from .recipes import recipe_of, remember

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAME = "apply_rotary_emb"
"""What processors call the function for rotary embeddings."""
_PAIRS = {-1: "adjacent", -2: "halves"}
"""The names of `ops.rotary_embedding` for diffusers' `use_real_unbind_dim`."""
PROCESSORS = frozenset(
    f"diffusers.models.transformers.{name}"
    for name in (
        *("transformer_flux.FluxAttnProcessor", "transformer_flux.FluxIPAdapterAttnProcessor"),
        *("transformer_flux2.Flux2AttnProcessor", "transformer_flux2.Flux2ParallelSelfAttnProcessor"),
        *("transformer_flux3.Flux3AttnProcessor", "transformer_krea2.Krea2AttnProcessor"),
        *("transformer_longcat_image.LongCatImageAttnProcessor", "transformer_ovis_image.OvisImageAttnProcessor"),
        *("transformer_bria.BriaAttnProcessor", "transformer_bria_fibo.BriaFiboAttnProcessor"),
        *("transformer_ltx.LTXVideoAttnProcessor", "ace_step_transformer.AceStepAttnProcessor2_0"),
    )
)
"""The processors that are copied, by the full name of their class. Subclasses are left alone."""
_CLASSES: dict[type, tuple[Callable[..., Any], dict[str, Any], type]] = {}
"""For each class of processors its `__call__`, the names that this saw, and the class of the copies."""


class _Rotary(torch.autograd.Function):
    """The op, which keeps the tables of cosines and sines alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs, ctx.backend = pairs, ops.choice()
        return ops.rotary_embedding(x, cos, sin, pairs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # Entering a backend takes longer than asking for the current one.
        with contextlib.nullcontext() if ops.choice() == ctx.backend else ops.backend(ctx.backend):
            return ops.rotary_embedding_backward(grad_outputs[0], cos, sin, ctx.pairs), None, None, None


def _again(backend: str, *args: Any) -> Tensor:
    """The rotated tensor again, by the backend that has computed it."""
    with ops.backend(backend):
        return ops.rotary_embedding(*args)


def _pays(x: Tensor) -> bool:
    """Whether the op is faster than PyTorch's operators and has their bits.

    On a GPU it rounds where they do. This depends on x's device, dtype, layout and size alone, and not on whether a
    graph is made or the call is recorded as a CUDA graph. So all calls of a run with equal inputs give the same bits.
    """
    if x.is_cpu:
        return ops.has_kernel("rotary_embedding", x) and ops.matches_torch("rotary_embedding")
    return x.is_cuda and ops.has_kernel("rotary_embedding", x)


def _is_used(x: Any, tables: Any) -> bool:
    """Whether the op may be called for a tensor (batch, tokens, heads, channels) and its tables."""
    if torch.compiler.is_compiling() or type(tables) is not tuple or len(tables) != 2:
        return False
    cos, sin = tables
    return (
        type(x) is type(cos) is type(sin) is Tensor
        and x.ndim == 4
        and x.dtype in _DTYPES
        and x.is_contiguous()
        and x.numel() >= level.SMALL  # At every level: what is computed must depend on the input alone.
        and cos.dtype == sin.dtype == torch.float32
        and cos.shape == sin.shape
        and cos.shape in ((x.shape[1], x.shape[3]), (x.shape[0], x.shape[1], x.shape[3]))
        and cos.device == sin.device == x.device
        and not (cos.requires_grad or sin.requires_grad)
        and not torch._C._is_any_autocast_enabled()
        and is_plain()
        and _pays(x)
    )


def _rotated(x: Tensor, tables: tuple[Tensor, Tensor], pairs: str) -> Tensor:
    """Calls the op. If something gives x again, that and the op give the result again."""
    cos, sin = tables
    if not (torch.is_grad_enabled() and x.requires_grad):
        return ops.rotary_embedding(x, cos, sin, pairs)
    y: Tensor = _Rotary.apply(x, cos, sin, pairs)  # type: ignore[no-untyped-call]
    if recipe_of(x) is None:
        return y
    return remember(y, functools.partial(_again, ops.choice()), x, cos, sin, pairs)


# What is called in the place of diffusers' functions, with their arguments


def _of_embeddings(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The one of diffusers.models.embeddings."""

    @functools.wraps(original)
    def apply_rotary_emb(
        x: Any, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1, sequence_dim: int = 2
    ) -> Tensor:
        if use_real is True and use_real_unbind_dim in _PAIRS and sequence_dim == 1 and _is_used(x, freqs_cis):
            return _rotated(x, freqs_cis, _PAIRS[use_real_unbind_dim])
        return original(x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)

    return apply_rotary_emb


def _of_ltx(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The one of LTX, for tensors (batch, tokens, channels) of all heads."""

    @functools.wraps(original)
    def apply_rotary_emb(x: Any, freqs: Any) -> Tensor:
        if type(x) is Tensor and x.ndim == 3:
            one_head = x.unsqueeze(2)
            if _is_used(one_head, freqs):
                return _rotated(one_head, freqs, "adjacent").squeeze(2)
        return original(x, freqs)

    return apply_rotary_emb


_REPLACED = {
    "diffusers.models.embeddings.apply_rotary_emb": _of_embeddings,
    "diffusers.models.transformers.transformer_ltx.apply_rotary_emb": _of_ltx,
}
"""What makes the function that is called in the place of one of diffusers."""


# Copies of processors


def _function(cls: type) -> Any:
    """The function that the processors of a class call for rotary embeddings, or None if it cannot be replaced."""
    call: Any = cls.__dict__.get("__call__")
    plain = type(call) is types.FunctionType and call.__closure__ is None and call.__module__ == cls.__module__
    return call.__globals__.get(NAME) if plain and NAME in call.__code__.co_names else None


def _full_name(named: Any) -> str:
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"


def why_not_fused(processor: Any) -> str | None:
    """Why a processor's rotary embeddings are computed by PyTorch's operators, "" if it has none, None if by the op."""
    cls = type(processor)
    code = getattr(getattr(processor, "__call__", None), "__code__", None)  # noqa: B004
    if code is None or NAME not in (*code.co_names, *code.co_varnames):
        return ""
    if _full_name(cls) not in PROCESSORS:
        return "its rotary embeddings are PyTorch's operators, as its class is not known"
    if _full_name(_function(cls)) not in _REPLACED:
        return "its rotary embeddings are a function that was replaced"
    return None


def _class_of_copies(cls: type) -> type:
    """The subclass of a class of processors whose rotary embeddings are the op.

    Its `__call__` sees the names of its module as they are now. If one of them is given another value later, as some
    packages do to replace the attention, the next run's copies are of another class.
    """
    call: Any = cls.__dict__["__call__"]
    now = call.__globals__
    before, names, kind = _CLASSES.get(cls, (None, {}, cls))
    if before is not call or len(names) != len(now) or any(names.get(name, now) is not now[name] for name in now):
        # torch.compile would look for the function in a module that is named here.
        inner = {key: value for key, value in now.items() if key != "__name__"}
        inner[NAME] = _REPLACED[_full_name(now[NAME])](now[NAME])
        function = types.FunctionType(call.__code__, inner, call.__name__, call.__defaults__)
        function.__kwdefaults__ = call.__kwdefaults__
        body = {"__call__": function, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        kind = type(cls.__name__, (cls,), body)
        _CLASSES[cls] = call, dict(now), kind
    return kind


def use_fused_rotary(original: nn.Module, copied: nn.Module) -> None:
    """Gives a copied attention layer a copy of its processor whose rotary embeddings are the op, if that is known.

    Args:
        original: The caller's layer, which is only read, as is its processor.
        copied: The copy. If it is itself a processor, it gets the other class.
    """
    processor = copied.__dict__.get("processor")
    if processor is not None and why_not_fused(processor) is None:
        clone: Any = object.__new__(_class_of_copies(type(processor)))
        clone.__dict__.update(processor.__dict__)
        copied.__dict__["processor"] = clone
    elif _full_name(type(original)) in PROCESSORS and why_not_fused(original) is None:
        kind: Any = _class_of_copies(type(original))
        copied.__class__ = kind
