"""Scaled cotangents for half-precision networks that plain autograd differentiates, as memory="naive" does.

The gradient of a small loss underflows in an fp16 network, and that of a large one overflows. The chain's own backward
pass divides each network's cotangent by a power of two and multiplies the network's gradient by it. Here two nodes of
the autograd graph around a call do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arithmetic import power_of_two
from .transforms import is_wrapped, transform_of


class _Power:
    """The power of two of one call, which the node behind the network sets and the one before it reads.

    It is None where nothing is scaled. A backward pass that builds a graph (create_graph=True) is not scaled, and none
    is after it: a second derivative also flows into the network between the two nodes, where the power does not apply.
    """

    value: Tensor | None = None
    forbidden = False


def scaled_call(
    function: Callable[[Tensor, Sequence[Tensor]], Tensor], source: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    """`function(source, tensors)`, whose gradients in half precision do not depend on the scale of the cotangent.

    Nothing is scaled under a transform, or if the function depends on other tensors that require grad: their gradients
    would be scaled and not scaled back.
    """
    if transform_of(source, *tensors) is not None:
        return function(source, tensors)
    power = _Power()
    enter: Callable[..., Tensor] = _Enter.apply  # This is untyped in torch.
    leave: Callable[..., Tensor] = _Leave.apply
    inputs = [enter(z, power) if z.requires_grad else z for z in (source, *tensors)]
    value = function(inputs[0], inputs[1:])
    entries = {z.grad_fn for z in inputs if z.grad_fn is not None}
    return leave(value, power) if value.requires_grad and _depends_only_on(value, entries) else value


def _depends_only_on(value: Tensor, entries: set[Any]) -> bool:
    """Whether every way back through the autograd graph ends at one of the nodes `entries`."""
    seen: set[Any] = set(entries)
    ahead: list[Any] = [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if hasattr(node, "variable"):  # It accumulates the gradient of another tensor.
            return False
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
    return True


class _Enter(torch.autograd.Function):
    """Stands before the network: multiplies the gradient by the power."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, power: _Power) -> Tensor:
        ctx.power = power
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        power = ctx.power.value
        return grad_outputs[0] if power is None else grad_outputs[0] * power.to(grad_outputs[0].dtype), None


class _Leave(torch.autograd.Function):
    """Stands behind the network: divides the cotangent by a power of two that brings it near 1."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, power: _Power) -> Tensor:
        ctx.power = power
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        power, cotangent = ctx.power, grad_outputs[0]
        power.forbidden = power.forbidden or torch.is_grad_enabled()
        power.value = None if power.forbidden or is_wrapped(cotangent) else power_of_two(cotangent)
        return cotangent if power.value is None else cotangent / power.value, None
