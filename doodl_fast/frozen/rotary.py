"""Rotary embeddings of queries and keys (RoPE, Su et al., arXiv 2104.09864) as one op, where that changes no bit.

diffusers writes them as some ten operators, each of which reads and writes the tensor, some of them in float32. The op
`ops.rotary_embedding` takes one pass, forward and backward. Autograd keeps nothing of the tensor in either way.

Some families multiply complex numbers instead, which is the same rotation. Its gradient is rounded once, and is the
rotation by the opposite angles.

The attention processors call a function of diffusers for this, which is no layer. So the copied attention layers of a
run get copies of their processors, whose `__call__` has the same code and another function under that name. diffusers'
own modules and the caller's processors are not changed.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .. import ops
from ..ops.transforms import is_plain
from . import level
from .functions import entered
from .layers import name_of
from .recipes import active, recipe_of, remember

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES = ("apply_rotary_emb", "apply_rotary_emb_qwen")
"""What processors call the function for rotary embeddings."""
_PAIRS = {-1: "adjacent", -2: "halves"}
"""The names of `ops.rotary_embedding` for diffusers' `use_real_unbind_dim`."""
LEAST = 2**23
"""Fewer numbers in float32 are multiplied by complex ones by PyTorch's operator, which is faster in the cache, and an
eighth of them in half precision (`bench/layers.py --op lean_rotary`)."""
PROCESSORS = frozenset(
    f"diffusers.models.transformers.{name}"
    for name in (
        *("transformer_flux.FluxAttnProcessor", "transformer_flux.FluxIPAdapterAttnProcessor"),
        *("transformer_flux2.Flux2AttnProcessor", "transformer_flux2.Flux2ParallelSelfAttnProcessor"),
        *("transformer_flux3.Flux3AttnProcessor", "transformer_krea2.Krea2AttnProcessor"),
        *("transformer_longcat_image.LongCatImageAttnProcessor", "transformer_ovis_image.OvisImageAttnProcessor"),
        *("transformer_bria.BriaAttnProcessor", "transformer_bria_fibo.BriaFiboAttnProcessor"),
        *("transformer_ltx.LTXVideoAttnProcessor", "ace_step_transformer.AceStepAttnProcessor2_0"),
        *("transformer_lumina2.Lumina2AttnProcessor2_0", "transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0"),
    )
)
"""The processors that are copied, by the full name of their class. Subclasses are left alone."""
_CLASSES: dict[type, tuple[Callable[..., Any], dict[str, Any], type]] = {}
"""For each class of processors its `__call__`, the names that this saw, and the class of the copies."""


class _Rotary(torch.autograd.Function):
    """The op, which keeps the tables alone: cosines and sines, or complex numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: str, *tables: Tensor) -> Tensor:
        ctx.save_for_backward(*tables)
        ctx.pairs, ctx.backend = pairs, ops.choice()
        return _op(x, pairs, *tables)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), tables = grad_outputs, ctx.saved_tensors
        with entered(ctx.backend):
            if len(tables) == 1:  # Autograd rounds the gradient of a product with complex numbers once.
                of_x = _op(grad, ctx.pairs, tables[0].conj())
            else:
                cos, sin = tables
                of_x = ops.rotary_embedding_backward(grad, cos, sin, ctx.pairs)
        return of_x, *[None] * (1 + len(tables))


def _op(x: Tensor, pairs: str, *tables: Tensor) -> Tensor:
    """The op with cosines and sines, or with those of complex numbers."""
    cos, sin = tables if len(tables) == 2 else _cosines_and_sines(*tables)
    return ops.rotary_embedding(x, cos, sin, pairs)


def _cosines_and_sines(factors: Tensor) -> list[Tensor]:
    """The tables of complex numbers. `repeat_interleave` would take nine times as long."""
    return [torch.stack([part, part], -1).flatten(-2) for part in (factors.real, factors.imag)]


def _again(backend: str, *args: Any) -> Tensor:
    """The rotated tensor again, by the backend that has computed it."""
    with entered(backend):
        return _op(*args)


def _pays(x: Tensor) -> bool:
    """Whether the op is faster than PyTorch's operators and has their bits.

    On a GPU it rounds where they do, but for products with complex numbers, whose terms the operators may add with one
    rounding. This depends on x's device, dtype, layout and size alone, and not on whether a graph is made or the call
    is recorded as a CUDA graph. So all calls of a run with equal inputs give the same bits.
    """
    if x.is_cpu:
        return ops.has_kernel("rotary_embedding", x) and ops.matches_torch("rotary_embedding")
    return x.is_cuda and ops.has_kernel("rotary_embedding", x)


def _is_used(x: Any, *tables: Any) -> bool:
    """Whether the op may be called for a tensor (batch, tokens, heads, channels) and its tables."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.ndim != 4:
        return False
    batch, tokens, _, size = x.shape
    shape, dtype = ((tokens, size), torch.float32) if len(tables) == 2 else ((tokens, size // 2), torch.complex64)
    return (
        x.dtype in _DTYPES
        and x.is_contiguous()
        and x.numel() >= level.SMALL  # At every level: what is computed must depend on the input alone.
        and all(type(table) is Tensor and table.dtype == dtype and not table.requires_grad for table in tables)
        and all(table.shape in (shape, (batch, *shape)) and table.device == x.device for table in tables)
        and tables[0].shape == tables[-1].shape
        and not torch._C._is_any_autocast_enabled()
        and is_plain()
        and _pays(x)
        and (len(tables) == 2 or not x.is_cpu or _pays_with_complex_numbers(x))
    )


def _pays_with_complex_numbers(x: Tensor) -> bool:
    """Whether the op is faster than a product of complex numbers on the CPU, a single operator, and has its bits."""
    many = LEAST if x.dtype == torch.float32 else LEAST // 8
    return x.numel() >= many and _complex_products_match(x.shape[-1], torch.get_num_threads() > 1)


@functools.cache
def _complex_products_match(size: int, threaded: bool) -> bool:
    """Whether the op has the bits of PyTorch's products of complex numbers on the CPU, for a number of channels."""
    generator = torch.Generator().manual_seed(0)
    with _disable_current_modes():  # What counts memory in a dispatch mode must not see the comparison.
        for tokens, heads in ((37, 3), (1 + 2**17 // size, 1)):
            x = torch.randn(2, tokens, heads, size, generator=generator, device="cpu")
            angles = torch.randn(tokens, size // 2, generator=generator, device="cpu")
            factors = torch.polar(torch.ones_like(angles), angles)
            product = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * factors[:, None]
            if not torch.equal(torch.view_as_real(product).flatten(-2), _op(x, "adjacent", factors)):
                return False
    return True


def _rotated(x: Tensor, pairs: str, *tables: Tensor) -> Tensor:
    """Calls the op. If something gives x again, that and the op give the result again."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _op(x, pairs, *tables)
    y: Tensor = _Rotary.apply(x, pairs, *tables)  # type: ignore[no-untyped-call]
    if recipe_of(x) is None:
        return y
    return remember(y, functools.partial(_again, ops.choice()), x, pairs, *tables)


# What is called in the place of diffusers' functions, with their arguments


def _by_operators(original: Callable[..., Tensor], x: Any, *args: Any) -> Tensor:
    """Calls diffusers' function. If something gives x again, that and the function give the result again."""
    y = original(x, *args)
    return remember(y, original, x, *args) if type(x) is Tensor and active(x) and recipe_of(x) is not None else y


def of_embeddings(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The one for diffusers.models.embeddings, which takes two tables, or complex numbers of each sample."""

    @functools.wraps(original)
    def apply_rotary_emb(
        x: Any, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1, sequence_dim: int = 2
    ) -> Tensor:
        if use_real is True and sequence_dim == 1 and use_real_unbind_dim in _PAIRS and _are_two(freqs_cis):
            if _is_used(x, *freqs_cis):
                return _rotated(x, _PAIRS[use_real_unbind_dim], *freqs_cis)
        elif use_real is False and type(freqs_cis) is Tensor and freqs_cis.ndim == 3 and _is_used(x, freqs_cis):
            return _rotated(x, "adjacent", freqs_cis)
        return _by_operators(original, x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)

    return apply_rotary_emb


def _are_two(tables: Any) -> bool:
    """Whether tables are one of cosines and one of sines."""
    return type(tables) is tuple and len(tables) == 2


def of_qwen(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The one for Qwen-Image, which takes complex numbers for all samples."""

    @functools.wraps(original)
    def apply_rotary_emb_qwen(x: Any, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1) -> Tensor:
        if use_real is False and type(freqs_cis) is Tensor and freqs_cis.ndim == 2 and _is_used(x, freqs_cis):
            return _rotated(x, "adjacent", freqs_cis)
        return _by_operators(original, x, freqs_cis, use_real, use_real_unbind_dim)

    return apply_rotary_emb_qwen


def of_ltx(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The one for LTX, which takes tensors (batch, tokens, channels) of all heads."""

    @functools.wraps(original)
    def apply_rotary_emb(x: Any, freqs: Any) -> Tensor:
        if type(x) is Tensor and x.ndim == 3 and _are_two(freqs):
            one_head = x.unsqueeze(2)
            if _is_used(one_head, *freqs):
                return _rotated(one_head, "adjacent", *freqs).squeeze(2)
        return _by_operators(original, x, freqs)

    return apply_rotary_emb


_REPLACED = {
    "diffusers.models.embeddings.apply_rotary_emb": of_embeddings,
    "diffusers.models.transformers.transformer_ltx.apply_rotary_emb": of_ltx,
    "diffusers.models.transformers.transformer_qwenimage.apply_rotary_emb_qwen": of_qwen,
}
"""What makes the function that is called in the place of one of diffusers."""


# Copies of processors


def _function(cls: type) -> tuple[str, Any]:
    """The name and the function that the processors of a class call for rotary embeddings, if it can be replaced."""
    call: Any = cls.__dict__.get("__call__")
    plain = type(call) is types.FunctionType and call.__closure__ is None and call.__module__ == cls.__module__
    for name in NAMES if plain else ():
        if name in call.__code__.co_names:
            return name, call.__globals__.get(name)
    return "", None


def why_not_fused(processor: Any) -> str | None:
    """Why a processor's rotary embeddings are computed by PyTorch's operators, "" if it has none, None if by the op."""
    cls = type(processor)
    code = getattr(getattr(processor, "__call__", None), "__code__", None)  # noqa: B004
    if code is None or not {*NAMES} & {*code.co_names, *code.co_varnames}:
        return ""
    if name_of(cls) not in PROCESSORS:
        return "its rotary embeddings are PyTorch's operators, as its class is not known"
    if name_of(_function(cls)[1]) not in _REPLACED:
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
        name, original = _function(cls)
        inner[name] = _REPLACED[name_of(original)](original)
        function = types.FunctionType(call.__code__, inner, call.__name__, call.__defaults__)
        function.__kwdefaults__ = call.__kwdefaults__
        body = {"__call__": function, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        kind = type(cls.__name__, (cls,), body)
        _CLASSES[cls] = call, dict(now), kind
    return kind


def use_fused_rotary(name: str, copied: nn.Module) -> None:
    """Gives a copied attention layer a copy of its processor whose rotary embeddings are the op, if that is known.

    Args:
        name: The full name of the layer's class. A processor that is a module itself gets the other class.
        copied: The copy of the caller's layer. Its processor is the caller's, and only read.
    """
    processor = copied.__dict__.get("processor")
    if processor is not None and why_not_fused(processor) is None:
        clone: Any = object.__new__(_class_of_copies(type(processor)))
        clone.__dict__.update(processor.__dict__)
        copied.__dict__["processor"] = clone
    elif name in PROCESSORS and why_not_fused(copied) is None:
        kind: Any = _class_of_copies(type(copied))
        copied.__class__ = kind
