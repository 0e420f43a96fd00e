"""Attention that keeps less: its queries, keys and values follow from what is saved anyway, and so may its output.

A fused attention kernel saves its inputs and its output. Under `Recording` cheap operators pass recipes on, so that
queries and keys need not be saved if norms and rotary embeddings made them of something that is. The output of a
cross-attention to few tokens costs next to nothing to compute again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .functions import recomputed
from .recipes import load, recipe_of, remember, save

FEW = 4
"""Where there are at most 1/FEW as many keys as queries, attention is computed again instead of saving its output."""

_T = Tensor
CHEAP: frozenset[Any] = frozenset(
    {_T.view, _T.reshape, _T.transpose, _T.permute, _T.flatten, _T.unflatten, _T.contiguous, _T.squeeze, _T.unsqueeze}
    | {
        _T.to,
        _T.float,
        _T.type_as,
        _T.mul,
        _T.__mul__,
        _T.__rmul__,
        _T.add,
        _T.__add__,
        _T.__radd__,
        _T.neg,
        _T.__neg__,
    }
    | {
        _T.expand,
        _T.repeat,
        _T.__getitem__,
        torch.cat,
        torch.stack,
        torch.mul,
        torch.add,
        torch.transpose,
        torch.reshape,
        torch.flatten,
    }
)
"""Operators that cost as little as reading their arguments, and change nothing in place."""
SPLITS: frozenset[Any] = frozenset({_T.unbind, _T.chunk, _T.split, torch.unbind, torch.chunk, torch.split})
"""Cheap operators that return several tensors."""
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Recording(TorchFunctionMode):
    """Passes recipes on through cheap operators inside a `with` block, and replaces attention by `attend`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return attend(func, *args, **kwargs)
        output = func(*args, **kwargs)
        if (func in CHEAP or func in SPLITS) and args and not any(isinstance(x, Tensor) for x in kwargs.values()):
            given = args[0] if type(args[0]) in (list, tuple) else args[:2]
            if any(isinstance(x, Tensor) and recipe_of(x) is not None for x in given):
                call = functools.partial(func, **kwargs) if kwargs else func
                if func in CHEAP:
                    return output if output is args[0] else remember(output, call, *args)
                for index, part in enumerate(output):
                    remember(part, functools.partial(_part, call, index), *args)
        return output


def _part(function: Callable[..., Any], index: int, *args: Any) -> Any:
    """One of the tensors that a function returns."""
    return function(*args)[index]


def attend(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Calls attention in the way that keeps the least for its gradient.

    Args:
        function: `scaled_dot_product_attention`.
        *args: Its arguments.
        **kwargs: Others of them by name.
    """
    options = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    query, key, value = (options.pop(name) for name in ARGUMENTS[:3])
    tensors = (query, key, value)
    mask = options.get("attn_mask")
    if options.get("dropout_p", 0.0) or (mask is not None and mask.requires_grad):
        return function(query, key, value, **options)
    call = functools.partial(function, **options)
    weights = () if mask is None else (mask,)
    if key.shape[-2] * FEW <= query.shape[-2]:
        return recomputed(call, *tensors, weights=weights)
    if all(recipe_of(x) is None for x in tensors):
        return call(*tensors)
    result: Tensor = _Attention.apply(call, weights, [recipe_of(x) or x for x in tensors], *tensors)  # type: ignore[no-untyped-call]
    return result


class _Source(torch.autograd.Function):
    """Begins a graph at a tensor without keeping that tensor, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:
        return None, None


class _Box:
    """Stands in a graph for the tensors that it has saved: each is an input of the graph, or has a number.

    Attributes:
        lock: Held while the graph is differentiated, so that one thread at a time fills the box.
        inputs: The inputs, while the graph is differentiated.
        others: The other tensors; those of the forward pass until they are saved elsewhere.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.lock = threading.Lock()
        self.inputs, self.others = list(inputs), list[Tensor]()

    def pack(self, saved: Tensor) -> tuple[int, bool]:
        """What the graph keeps in place of a saved tensor: its number, and whether it is one of the inputs."""
        for index, x in enumerate(self.inputs):
            if saved.untyped_storage()._cdata == x.untyped_storage()._cdata and _same_view(saved, x):
                return index, True
        self.others.append(saved)
        return len(self.others) - 1, False

    def unpack(self, packed: tuple[int, bool]) -> Tensor:
        """The tensor in whose place something was kept."""
        index, is_input = packed
        return (self.inputs if is_input else self.others)[index]

    def empty(self) -> None:
        """Lets go of all tensors."""
        self.inputs, self.others = [], []


def _same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have the same elements."""
    return (a.dtype, a.shape, a.stride(), a.storage_offset()) == (b.dtype, b.shape, b.stride(), b.storage_offset())


class _Attention(torch.autograd.Function):
    """Attention whose inputs are computed again for its gradient, and whose output is not.

    The kernel that PyTorch picks, and so what it saves, depends on the device, the shapes and the dtype. So the forward
    pass records a graph of the one call, with a `_Box` in place of its saved tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., Tensor], weights: Sequence[Tensor], kept: Sequence[Any], *inputs: Tensor
    ) -> Tensor:
        token = torch.empty((), requires_grad=True)
        with torch.enable_grad():
            source: Callable[..., Tensor] = _Source.apply
            parts = [source(token, x.detach()) if x.requires_grad else x for x in inputs]
            box = _Box(parts)
            with saved_tensors_hooks(box.pack, box.unpack):
                output = call(*parts)
        save(ctx, *kept, *box.others, also=weights)
        box.empty()
        ctx.call, ctx.box, ctx.end = call, box, get_gradient_edge(output)
        ctx.sources = [get_gradient_edge(x) for x in parts if x.requires_grad]
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, wanted = load(ctx), ctx.needs_input_grad[3:]
        inputs = values[: len(wanted)]
        if torch.is_grad_enabled():  # A second derivative needs the way back to the inputs.
            asked = [x for x, want in zip(inputs, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(ctx.call(*inputs), asked, grad_outputs, create_graph=True))
        else:
            with ctx.box.lock:
                ctx.box.inputs, ctx.box.others = inputs, values[len(wanted) :]
                try:
                    found = iter(torch.autograd.grad(ctx.end, ctx.sources, grad_outputs, retain_graph=True))
                finally:
                    ctx.box.empty()
        return None, None, None, *(next(found) if want else None for want in wanted)
