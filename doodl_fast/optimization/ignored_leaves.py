"""Finds tensors that a loss depends on and that an optimisation would leave as they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

SHOWN = 3


def warn_of_ignored_leaves(value: Tensor, known: Sequence[Tensor]) -> None:
    """Warns if the graph of a loss reaches a tensor that requires grad and that is not optimised.

    A regulariser on the starting latents that a loss closes over is an example: it changes the loss and never the
    gradient.

    Args:
        value: The loss, a 0-dim tensor with a graph.
        known: The latents of the decoder and the variables, which the loss is differentiated with respect to.
    """
    expected = {id(tensor) for tensor in known}
    ignored = [tensor for tensor in leaves(value) if id(tensor) not in expected]
    if not ignored:
        return
    names = ", ".join(f"{tuple(t.shape)} {t.dtype} {type(t).__name__}" for t in ignored[:SHOWN])
    more = f" and {len(ignored) - SHOWN} more" if len(ignored) > SHOWN else ""
    warnings.warn(
        f"loss: it depends on {len(ignored)} tensor(s) that require grad and that optimize neither changes nor "
        f"differentiates: {names}{more}. Only the decoded images carry a gradient to the latents, so a term on another "
        "tensor has no effect. Name what the term needs as a parameter of the loss (start, latents, noise), or call "
        "tensor.requires_grad_(False) if the tensor is meant to be constant, as the weights of a guide are",
        RuntimeWarning,
        stacklevel=2,
    )


def leaves(value: Tensor) -> list[Tensor]:
    """The leaf tensors that require grad in the graph of `value`, each once."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only nodes that accumulate gradients of leaves have it
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        waiting += [other for other, _ in node.next_functions]
    return list(found.values())
