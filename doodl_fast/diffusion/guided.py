"""`Guided`: an extra argument of a network that differs between the two halves of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Guided(NamedTuple):
    """A pair of conditions, one for each half of a guided evaluation.

    A tensor of 2 rows is ambiguous for a batch of 2: it could hold one row for each latent, or one for each half. A
    pair is not. Without guidance `cond` alone is used.

    Attributes:
        uncond: For the unconditional half, (1, ...) or (B, ...).
        cond: For the conditional half, (1, ...) or (B, ...).

    Example:
        >>> Denoiser(unet, cond, uncond, added_cond_kwargs={"text_embeds": Guided(negative_pooled, pooled)})
    """

    uncond: Tensor
    cond: Tensor


def join_pairs(tree: Any, guided: bool, expand: Callable[[Tensor, str], Tensor], name: str = "") -> Any:
    """Returns the tree of dicts, lists and tuples with every `Guided` pair replaced by one tensor.

    Args:
        tree: The network's extra arguments.
        guided: Whether both halves are evaluated, [uncond; cond], or `cond` alone.
        expand: Brings one half to the latents' batch and dtype; its second argument is the half's name.
        name: The name of the tree, for error messages.
    """
    if isinstance(tree, Guided):
        halves = [expand(tree.uncond, f"{name}.uncond")] if guided else []
        return torch.cat([*halves, expand(tree.cond, f"{name}.cond")])
    if isinstance(tree, dict):
        return {
            key: join_pairs(value, guided, expand, f"{name}[{key!r}]" if name else str(key))
            for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        items = [join_pairs(value, guided, expand, f"{name}[{index}]") for index, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def unconditional(tree: Any) -> Any:
    """Returns the tree of dicts, lists and tuples with every `Guided` pair replaced by its unconditional half."""
    if isinstance(tree, Guided):
        return tree.uncond
    if isinstance(tree, dict):
        return {key: unconditional(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [unconditional(value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree
