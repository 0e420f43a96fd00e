"""Registers an op with PyTorch from its row in the table of signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends.registry import backend, choice
from .signatures import Signature
from .transforms import refuse_tangents

NAMESPACE = __name__.partition(".")[0]
"""The ops' namespace: "doodl_fast". A copy of this package under another name, such as the Hub's loader makes, has a
namespace of its own, so that several versions can be in one process."""
registered: Any = getattr(torch.ops, NAMESPACE)
"""The registered ops by their names: `torch.ops.doodl_fast`."""


def register(
    signature: Signature,
    forward: Callable[..., Any],
    fake: Callable[[Any], Any],
    *,
    remember: Callable[[Any, Any, Any], None] | None = None,
    gradient: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> None:
    """Registers an op as `torch.ops.doodl_fast.<name>`, with its fake implementation and, if it has one, its gradient.

    Args:
        signature: The op's row in the table.
        forward: Takes the op's arguments in the order of the table and returns its output, or a tuple of its outputs,
            with None for an optional output that the call does not want.
        fake: Takes the arguments as a named tuple (`signature.call`) and returns tensors like those of `forward`,
            whose values are not computed. `torch.compile` traces with it.
        remember: Takes autograd's `ctx`, the arguments as a named tuple and the output, and keeps on `ctx` what
            `gradient` needs.
        gradient: Takes `ctx` and the cotangents of the outputs, and returns the cotangents of the op's arguments,
            from the first on. Those that it does not return are None.
    """

    def packed(outputs: Any) -> Any:
        return [out for out in outputs if out is not None] if signature.has_optional_outputs else outputs

    def run(*arguments: Any) -> Any:
        refuse_tangents(signature.name, *(value for value in arguments if isinstance(value, Tensor)))
        return packed(forward(*arguments))

    op = torch.library.custom_op(
        f"{NAMESPACE}::{signature.name}", run, mutates_args=signature.written, schema=signature.schema
    )
    op.register_fake(lambda *arguments: packed(fake(signature.call(*arguments))))
    if gradient is None or remember is None:
        return

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = choice()  # Autograd may run the backward pass in a thread of its own, which has no context.
        ctx.num_arguments = len(inputs)
        remember(ctx, signature.call(*inputs), output)

    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        with backend(ctx.backend):
            gradients = gradient(ctx, *cotangents)
        return (*gradients, *[None] * (ctx.num_arguments - len(gradients)))

    op.register_autograd(backward, setup_context=setup_context)
