"""What one evaluation of the objective gives: losses, images and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """Losses of the current values of all variables, with their gradients where those were asked for.

    Attributes:
        losses: The loss of each scored image, x's and y's or x's alone. Of a batch of optimisations it is the mean.
        images: The images, detached.
        terms: The value of each loss by name, without its weight; means over the scored images.
        samples: For each scored image the losses of all B optimisations, if the batch is one of them.
        sample_terms: For each loss by name its value for each of them, a mean over the scored images.
        gradients: [dL/dx, dL/dy] with L the sum of the losses (over the batch too, if it is one of optimisations).
        variables: The gradients of L divided by the number of scored images, for each other variable.
        starts: From how many latents the chain starts. If it is one, both gradients are its own.
    """

    losses: tuple[float, ...]
    images: tuple[Tensor, ...]
    terms: dict[str, float] = field(default_factory=dict)
    samples: tuple[tuple[float, ...], ...] = ()
    sample_terms: dict[str, list[float]] = field(default_factory=dict)
    gradients: tuple[Tensor, ...] = ()
    variables: dict[str, list[Tensor]] = field(default_factory=dict)
    starts: int = 2

    @property
    def mean(self) -> float:
        """The mean loss."""
        return sum(self.losses) / len(self.losses)

    def mean_gradients(self) -> list[Tensor]:
        """[d mean/dx, d mean/dy], where y has no share if the chain starts from x alone."""
        x, y = (gradient / len(self.losses) for gradient in self.gradients)
        return [x, torch.zeros_like(y) if self.starts == 1 else y]

    def sample_means(self) -> list[float]:
        """The loss of each optimisation of the batch, a mean over its scored images; empty without any."""
        return [sum(values) / len(values) for values in zip(*self.samples, strict=True)]
