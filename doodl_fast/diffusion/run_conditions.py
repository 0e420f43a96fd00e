"""The conditions of a run, which are cast, expanded and joined to `[uncond; cond]` once, not at every evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .conditions import Fit, map_tensors, tensors_of


class RunConditions:
    """Brings conditions to the form that a network takes, and keeps the result for the next evaluation of the run.

    Nothing is kept where a graph must lead back to the conditions, and nothing more once the network has changed its
    arguments in place, which tensors count in their version.
    """

    def __init__(self) -> None:
        self._keeps = True
        self._given: list[tuple[Tensor, int]] = []
        self._fit: Fit | None = None
        self._made: tuple[Tensor | None, Any] = None, {}
        self._versions: list[int] = []

    def fitted(self, fit: Fit, conditions: dict[str, Any]) -> tuple[Tensor | None, Any]:
        """Returns the condition and the extra arguments for one call of the network.

        Args:
            fit: What they are brought to.
            conditions: The tree with "cond", "kwargs", and "uncond" under guidance.

        Raises:
            ValueError: A condition does not fit the batch.
        """
        leaves = tensors_of(conditions)
        if not self._keeps or any(leaf.is_inference() for leaf in leaves):
            return _made(fit, conditions)
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            return _made(fit, conditions)
        if self._fit is not None and _versions(self._made) != self._versions:
            self._keeps, self._given, self._made = False, [], (None, {})
            return _made(fit, conditions)
        given = [(leaf, leaf._version) for leaf in leaves]
        if fit != self._fit or not _same(given, self._given):
            made = _made(fit, conditions)
            if any(leaf.is_inference() for leaf in tensors_of(made)):  # They count no versions.
                return made
            self._fit, self._given, self._made, self._versions = fit, given, made, _versions(made)
        cond, kwargs = self._made
        # The network may change the dicts and lists of its arguments, so it gets new ones.
        return cond, map_tensors(kwargs, lambda leaf, _name: leaf)


def _made(fit: Fit, conditions: dict[str, Any]) -> tuple[Tensor | None, Any]:
    """Makes the condition and the extra arguments."""
    return fit.states(conditions["cond"], conditions.get("uncond")), fit.extras(conditions["kwargs"])


def _versions(tree: Any) -> list[int]:
    """How often each tensor of a tree was changed in place."""
    return [leaf._version for leaf in tensors_of(tree)]


def _same(given: list[tuple[Tensor, int]], before: list[tuple[Tensor, int]]) -> bool:
    """Whether the conditions are the same tensors, in the same versions."""
    return len(given) == len(before) and all(
        leaf is other and version == then for (leaf, version), (other, then) in zip(given, before, strict=True)
    )
