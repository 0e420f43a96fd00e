"""The update of all variables of an optimisation: the pair of starting latents, and whatever else is optimised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .evaluation import Evaluation
from .update import LatentUpdate
from .variables import Variable

Values = dict[str, list[Tensor]]
Evaluate = Callable[[list[Tensor], Values], Evaluation]
"""Latents [x, y] and the other variables' values -> losses and gradients."""


class JointUpdate:
    """Holds the starting latents and the other variables, and changes them one after another.

    Args:
        latent: The starting latents and their update.
        others: The other variables by name.
        moves_start: Whether the starting latents are a variable.
    """

    def __init__(
        self, latent: LatentUpdate, others: Mapping[str, Variable] | None = None, moves_start: bool = True
    ) -> None:
        self.latent, self.others, self.moves_start = latent, dict(others or {}), moves_start

    @property
    def latents(self) -> list[Tensor]:
        """The starting latents [x, y]."""
        return self.latent.latents

    def values(self) -> Values:
        """Copies of the other variables' tensors."""
        return {name: [t.clone() for t in variable.tensors] for name, variable in self.others.items()}

    def step(self, found: Evaluation, evaluate: Evaluate, kept: Tensor | None = None) -> None:
        """Updates every variable once.

        Args:
            found: The losses and gradients of the current values.
            evaluate: Gives those of other values, to optimizers that evaluate the loss several times. They move one
                variable at a time.
            kept: Of a batch of optimisations (B,), which have ended and keep their values; None if none has.
        """
        # Gradients are those of the values before the step, also where a variable has moved already.
        if self.moves_start:
            self._step_start(found, evaluate, kept)
        for name, variable in self.others.items():

            def again(tensors: list[Tensor], name: str = name) -> tuple[float, list[Tensor]]:
                other = evaluate(self.latents, {**self.values(), name: tensors})
                return other.mean, other.variables[name]

            variable.step(found.variables[name], found.mean, again, kept)

    def _step_start(self, found: Evaluation, evaluate: Evaluate, kept: Tensor | None) -> None:
        """Updates the starting latents."""

        def again(latents: list[Tensor]) -> tuple[float, list[Tensor]]:
            other = evaluate(latents, self.values())
            return other.mean, other.mean_gradients()

        before = self.latent.latents
        grad_x, grad_y = found.gradients
        if self.latent.stepper is None:
            self.latent.step(grad_x, grad_y)
        else:
            self.latent.step(grad_x, grad_y, found.mean, found.mean_gradients(), again)
        if kept is not None:
            mask = kept.view(-1, *[1] * (before[0].ndim - 1))
            self.latent.latents = [
                torch.where(mask, old, new) for old, new in zip(before, self.latent.latents, strict=True)
            ]

    def state(self) -> dict[str, Any]:
        """All that `load` needs, as a tree of tensors and plain values."""
        others = {name: variable.state() for name, variable in self.others.items()}
        return {**self.latent.state(), **({"variables": others} if others else {})}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned."""
        self.latent.load(dict(state))
        for name, variable in self.others.items():
            variable.load(state["variables"][name])
