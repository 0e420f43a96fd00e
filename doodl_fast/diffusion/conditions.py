"""The conditions of a network: brought to the latents' batch and dtype, for one half of guidance or for both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .guided import Guided, join_pairs


@dataclass(frozen=True)
class Fit:
    """What conditions are brought to for one call of the network. Every tensor that results is a copy.

    A network may change its arguments in place, and the caller's tensors must not change with them.

    Attributes:
        batch: The batch size B of the latents.
        dtype: The dtype of the network; floating conditions are cast to it.
        guided: Whether the call is made on 2B rows, [uncond; cond], or on the B rows of cond alone.
        has_uncond: Whether unconditional conditions were given, so that an extra argument may hold both halves.
    """

    batch: int
    dtype: torch.dtype
    guided: bool
    has_uncond: bool

    def states(self, cond: Tensor | None, uncond: Tensor | None) -> Tensor | None:
        """Returns the conditions themselves, (2B, ...) under guidance, else (B, ...); None if there are none."""
        if cond is None:
            return None
        if not self.guided or uncond is None:
            return self.rows(cond, "cond")
        return torch.cat([self.rows(uncond, "uncond"), self.rows(cond, "cond")])

    def extras(self, tree: dict[str, Any]) -> Any:
        """Returns the network's extra arguments, every tensor of which has a row for each row of the network's input.

        Args:
            tree: Dicts, lists and tuples of tensors, of `Guided` pairs, and of other values, which stay as they are.

        Raises:
            ValueError: A tensor has another leading dimension, or one that can be read in two ways.
        """
        return join_pairs(map_tensors(tree, self._extra, pairs=False), self.guided, self.rows)

    def rows(self, leaf: Tensor, name: str) -> Tensor:
        """Returns B rows of a tensor that has 1 or B."""
        if leaf.ndim == 0 or leaf.shape[0] not in (1, self.batch):
            raise ValueError(
                f"{name}: expected a leading dimension of 1 or {self.batch} (the latents' batch), got "
                f"{leaf.shape[0] if leaf.ndim else 'a 0-dim tensor'}"
            )
        return self._cast(leaf).expand(self.batch, *leaf.shape[1:])

    def _extra(self, leaf: Tensor, name: str) -> Tensor:
        """Returns one extra argument for all rows of the network's input."""
        if leaf.ndim == 0:
            return self._cast(leaf)
        if not self.has_uncond:
            return self.rows(leaf, name)
        if self.batch == 2 and leaf.shape[0] == 2:
            raise ValueError(
                f"{name}: a leading dimension of 2 can be read in two ways for a batch of 2 latents, as one row for "
                "each latent or as [uncond; cond]; expected a pair for one of them: "
                "doodl_fast.Guided(rows, rows) for one row for each latent, used for both halves, or "
                "doodl_fast.Guided(rows[:1], rows[1:]) for [uncond; cond]"
            )
        return self._both_halves(leaf, name) if self.guided else self._second_half(leaf, name)

    def _both_halves(self, leaf: Tensor, name: str) -> Tensor:
        """Returns 2B rows, [uncond; cond]."""
        count, batch = leaf.shape[0], self.batch
        if count in (1, batch):
            half = self.rows(leaf, name)
            return torch.cat([half, half])
        if count == 2 * batch:
            return self._cast(leaf)
        if count == 2:
            return self._cast(leaf).repeat_interleave(batch, dim=0)
        raise ValueError(
            f"{name}: expected a leading dimension of 1, {batch} (used for both halves), {2 * batch} ([uncond; cond]) "
            f"or 2 (one of each), got {count}"
        )

    def _second_half(self, leaf: Tensor, name: str) -> Tensor:
        """Returns B rows for cond alone, which are the second half of a tensor for [uncond; cond]."""
        count = leaf.shape[0]
        if count not in (1, self.batch) and count in (2, 2 * self.batch):
            leaf = leaf[count // 2 :]
        return self.rows(leaf, name)

    def _cast(self, leaf: Tensor) -> Tensor:
        """Returns a copy, in the network's dtype if the tensor is floating."""
        return leaf.to(self.dtype if leaf.is_floating_point() else leaf.dtype, copy=True)


def map_tensors(tree: Any, function: Callable[[Tensor, str], Any], name: str = "", pairs: bool = True) -> Any:
    """Returns the same tree of dicts, lists and tuples with every tensor replaced.

    Args:
        tree: The tree.
        function: What a tensor is replaced by, given the tensor and its name for error messages.
        name: The name of the tree.
        pairs: Whether the tensors of `Guided` pairs are replaced too.
    """
    if isinstance(tree, Tensor):
        return function(tree, name)
    if isinstance(tree, Guided) and not pairs:
        return tree
    if isinstance(tree, dict):
        return {
            key: map_tensors(value, function, f"{name}[{key!r}]" if name else str(key), pairs)
            for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        items = [map_tensors(value, function, f"{name}[{index}]", pairs) for index, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns every tensor of a tree of dicts, lists and tuples, in the order in which `map_tensors` visits them."""
    found: list[Tensor] = []
    map_tensors(tree, lambda leaf, _name: found.append(leaf))
    return found


def check_conditions(cond: Any, uncond: Any, guidance_scale: Any) -> None:
    """Raises TypeError or ValueError, naming the argument, unless the conditions and the scale fit each other."""
    for name, value in (("cond", cond), ("uncond", uncond)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(value).__name__}")
        if value is not None and value.ndim == 0:
            raise ValueError(f"{name}: expected a leading batch dimension, got a 0-dim tensor")
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: expected a finite number, got {guidance_scale!r}")
    if cond is None and uncond is not None:
        raise ValueError("cond: expected a tensor because uncond is given, got None; guidance needs both")
    if cond is not None and uncond is not None and cond.shape[1:] != uncond.shape[1:]:
        raise ValueError(f"uncond: expected cond's shape {tuple(cond.shape)} but for B, got {tuple(uncond.shape)}")
