"""Autograd functions of frozen layers, which give the input's gradient alone and save as little as that needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .recipes import load, recipe_of, save

Function = Callable[..., Tensor]


def entered(backend: str) -> contextlib.AbstractContextManager[Any]:
    """Chooses a backend of the ops, if it is not chosen already: entering one takes longer than asking for it."""
    return contextlib.nullcontext() if ops.choice() == backend else ops.backend(backend)


class _Recomputed(torch.autograd.Function):
    """`function(*inputs)`, computed again with a graph when its gradient is taken."""

    @staticmethod
    def forward(
        ctx: Any, function: Function, weights: Sequence[Tensor], kept: Sequence[Any], *inputs: Tensor
    ) -> Tensor:
        save(ctx, *kept, also=weights)
        ctx.function = function
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # A second derivative needs the way back to the inputs.
        inputs, wanted = load(ctx), ctx.needs_input_grad[3:]
        with torch.enable_grad():
            if not again:
                inputs = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
            output = ctx.function(*inputs)
            asked = [x for x, want in zip(inputs, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(output, asked, grad_outputs, create_graph=again))
        return None, None, None, *(next(found) if want else None for want in wanted)


def recomputed(function: Function, *inputs: Tensor, weights: Sequence[Tensor] = ()) -> Tensor:
    """Calls a function and keeps nothing but its inputs, or what those follow from, for the gradient.

    Args:
        function: A deterministic function of tensors that returns one tensor.
        *inputs: Its arguments.
        weights: Tensors that it uses besides, which want no gradient; a change of them in place will be an error.
    """
    kept = [recipe_of(x) or x for x in inputs]
    result: Tensor = _Recomputed.apply(function, weights, kept, *inputs)  # type: ignore[no-untyped-call]
    return result


class _Activation(torch.autograd.Function):
    """An elementwise function of a tensor that has a recipe."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recipe: Any, function: Function, backward: Function) -> Tensor:
        save(ctx, recipe)
        ctx.function, ctx.gradient = function, backward
        return function(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = load(ctx)
        if torch.is_grad_enabled():  # A second derivative needs the way back to x.
            return *torch.autograd.grad(ctx.function(x), x, grad_outputs, create_graph=True), None, None, None
        return ctx.gradient(grad_outputs[0], x), None, None, None


def activation(x: Tensor, function: Function, backward: Function) -> Tensor:
    """Applies an elementwise function, and saves what x follows from instead of x if it has a recipe.

    Args:
        x: The argument.
        function: The function.
        backward: Gives its gradient from the cotangent and x.
    """
    recipe = recipe_of(x)
    if recipe is None:
        return function(x)
    result: Tensor = _Activation.apply(x, recipe, function, backward)  # type: ignore[no-untyped-call]
    return result
