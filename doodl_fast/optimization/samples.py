"""A batch as independent optimisations: each sample has its own losses, best step and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .evaluation import Evaluation
from .result import Result, as_images

Values = dict[str, list[Tensor]]


def has_stalled(losses: Sequence[float], patience: int | None, min_delta: float) -> bool:
    """Whether the last `patience` losses are no better than one before them, by more than `min_delta`.

    Args:
        losses: All losses so far.
        patience: How many; None for never.
        min_delta: By how much a loss must be lower to count as better.
    """
    if patience is None:
        return False
    best, best_step = float("inf"), 0
    for step, loss in enumerate(losses):
        if loss < best - min_delta:
            best, best_step = loss, step
    return len(losses) - 1 - best_step >= patience


@dataclass
class Samples:
    """What is remembered of each sample of a batch.

    Attributes:
        count: How many samples B there are.
        losses: For every step and scored image the losses of the samples.
        terms: For every step the values of all losses by name, for each sample.
        ended: For each sample the step at which it ended, or None.
        best_steps: For each sample the step with its lowest loss.
        best_losses: Those losses.
        best_latents: The latents [x, y] of these steps, each (B, ...).
        best_values: The other variables of these steps.
    """

    count: int
    best_latents: list[Tensor]
    best_values: Values
    losses: list[list[list[float]]] = field(default_factory=list)
    terms: list[dict[str, list[float]]] = field(default_factory=list)
    ended: list[int | None] = field(default_factory=list)
    best_steps: list[int] = field(default_factory=list)
    best_losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ended = self.ended or [None] * self.count
        self.best_steps = self.best_steps or [0] * self.count
        self.best_losses = self.best_losses or [float("inf")] * self.count

    def means(self, sample: int) -> list[float]:
        """The mean losses of a sample until its end."""
        last = self.ended[sample]
        steps = self.losses if last is None else self.losses[: last + 1]
        return [sum(member[sample] for member in step) / len(step) for step in steps]

    def record(
        self, found: Evaluation, latents: Sequence[Tensor], values: Values, stalled: Callable[..., bool]
    ) -> bool:
        """Notes the losses of the current values, and which samples end here.

        Args:
            found: The losses.
            latents: The latents [x, y].
            values: The other variables.
            stalled: Losses of a sample so far -> whether it ends.

        Returns:
            Whether all have ended.
        """
        step = len(self.losses)
        self.losses.append([list(member) for member in found.samples])
        self.terms.append(found.sample_terms)
        better = [
            self.ended[sample] is None and loss < self.best_losses[sample]
            for sample, loss in enumerate(found.sample_means())
        ]
        for sample, loss in enumerate(found.sample_means()):
            if better[sample]:
                self.best_losses[sample], self.best_steps[sample] = loss, step
            if self.ended[sample] is None and stalled(self.means(sample)):
                self.ended[sample] = step
        self.best_latents = _merged(better, latents, self.best_latents)
        self.best_values = {name: _merged(better, values[name], old) for name, old in self.best_values.items()}
        return all(end is not None for end in self.ended)

    def kept(self, device: torch.device) -> Tensor | None:
        """A mask (B,) of the samples that have ended; None if none has."""
        if all(end is None for end in self.ended):
            return None
        return torch.tensor([end is not None for end in self.ended], device=device)

    def finish(
        self,
        final: Evaluation,
        latents: Sequence[Tensor],
        values: Values,
        is_seen: bool,
        score: Callable[[list[Tensor], Values], Evaluation],
    ) -> tuple[list[Result], tuple[Tensor, ...]]:
        """The result of each sample, and the images of each sample's best values.

        Args:
            final: The losses and images of the final values.
            latents: The final latents [x, y].
            values: The final values of the other variables.
            is_seen: Whether the final values have been recorded already, because the run ended before an update.
            score: Scores the best values.
        """
        lasts = final.sample_means()
        wins = [
            not is_seen and self.ended[sample] is None and loss <= self.best_losses[sample]
            for sample, loss in enumerate(lasts)
        ]
        for sample, wins_here in enumerate(wins):
            if wins_here:
                self.best_losses[sample], self.best_steps[sample] = lasts[sample], len(self.losses)
        self.best_latents = _merged(wins, latents, self.best_latents)
        self.best_values = {name: _merged(wins, values[name], old) for name, old in self.best_values.items()}
        best_images = final.images if all(wins) else score(self.best_latents, self.best_values).images
        results = [
            self._result(sample, latents, values, final.images, lasts[sample], best_images)
            for sample in range(self.count)
        ]
        return results, best_images

    def _result(
        self,
        sample: int,
        latents: Sequence[Tensor],
        values: Values,
        images: Sequence[Tensor],
        final_loss: float,
        best_images: Sequence[Tensor],
    ) -> Result:
        """The result of one sample."""

        def own(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [t[sample : sample + 1] for t in tensors]

        losses = self.means(sample)
        x, y = own(latents)
        best_x, best_y = own(self.best_latents)
        return Result(
            (x, y),
            as_images(own(images)),
            losses,
            [tuple(member[sample] for member in step) for step in self.losses[: len(losses)]],
            final_loss,
            self.best_steps[sample],
            self.best_losses[sample],
            (best_x, best_y),
            as_images(own(best_images)),
            {
                name: [step[name][sample] for step in self.terms[: len(losses)]]
                for name in (self.terms[0] if self.terms else {})
            },
            {name: own(tensors) for name, tensors in values.items()},
            {name: own(tensors) for name, tensors in self.best_values.items()},
        )

    def state(self) -> dict[str, Any]:
        """All that `load` needs, as a tree of tensors and plain values."""
        names = ("losses", "terms", "ended", "best_steps", "best_losses", "best_latents", "best_values")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned."""
        device = self.best_latents[0].device
        for name, value in state.items():
            setattr(self, name, value)
        self.best_latents = [z.to(device) for z in state["best_latents"]]
        self.best_values = {name: [t.to(device) for t in ts] for name, ts in state["best_values"].items()}


def _merged(taken: Sequence[bool], new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """The rows of `new` where `taken` says so, and those of `old` elsewhere."""
    if not any(taken):
        return list(old)
    mask = torch.tensor(taken, device=old[0].device)
    return [
        torch.where(mask.view(-1, *[1] * (before.ndim - 1)), after, before)
        for after, before in zip(new, old, strict=True)
    ]
