"""The progress of one optimisation: what is stored after each step, and what the result is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint
from .evaluation import Evaluation
from .fingerprint import Fingerprint, check_same
from .joint_update import JointUpdate
from .objective import Objective
from .result import Result
from .samples import Samples, has_stalled
from .update import LatentUpdate

Values = dict[str, list[Tensor]]


class Progress:
    """Where an optimisation stands.

    Args:
        update: Holds the variables and what their next update needs.
        settings: Plain values that a stored run must have in common with the run that resumes it.
        functions: Identifies the chain, the decoder and the loss, which must be the same too.
        per_sample: Whether each sample of the batch is an optimisation of its own.
        patience: After how many steps without a better loss the run, or a sample, ends. None for never.
        min_delta: By how much a loss must be lower to count as better.
    """

    def __init__(
        self,
        update: LatentUpdate | JointUpdate,
        settings: dict[str, Any],
        functions: Fingerprint | None = None,
        per_sample: bool = False,
        patience: int | None = None,
        min_delta: float = 0.0,
    ) -> None:
        self.update = update if isinstance(update, JointUpdate) else JointUpdate(update)
        self.settings = settings
        self.functions = functions or {}
        self.patience, self.min_delta = patience, min_delta
        self.step = 0
        self.pair_losses: list[tuple[float, ...]] = []
        self.history: list[dict[str, float]] = []
        self.best_step = 0
        self.best_loss = float("inf")
        self.best_latents = list(self.update.latents)
        self.best_values = self.update.values()
        count = self.update.latents[0].shape[0]
        self.samples = Samples(count, self.best_latents, self.best_values) if per_sample else None

    @property
    def losses(self) -> list[float]:
        """The mean loss of every step so far."""
        return [sum(pair) / len(pair) for pair in self.pair_losses]

    def record(self, found: Evaluation) -> bool:
        """Notes the losses of the current values, before their update. Returns whether the run ends here."""
        self.pair_losses.append(found.losses)
        self.history.append(found.terms)
        values = self.update.values()
        if self.losses[-1] < self.best_loss:
            self.best_loss, self.best_step = self.losses[-1], self.step
            self.best_latents, self.best_values = list(self.update.latents), values
        if self.samples is not None:
            return self.samples.record(found, self.update.latents, values, self._has_stalled)
        return self._has_stalled(self.losses)

    def _has_stalled(self, losses: list[float]) -> bool:
        return has_stalled(losses, self.patience, self.min_delta)

    def kept(self) -> Tensor | None:
        """A mask of the samples that have ended; None if none has."""
        return None if self.samples is None else self.samples.kept(self.update.latents[0].device)

    def tree(self) -> dict[str, Any]:
        """All that `load` needs, with PyTorch's global random state."""
        names = ("settings", "functions", "step", "best_step", "best_loss", "best_latents", "best_values", "history")
        tree = {name: getattr(self, name) for name in names}
        return {
            **tree,
            "pair_losses": list(self.pair_losses),
            "update": self.update.state(),
            "random": checkpoint.random_state(),
            "samples": None if self.samples is None else self.samples.state(),
        }

    def save(self, home: Path) -> None:
        """Stores the progress in the folder `home`. Its values are finite, as the update checks."""
        checkpoint.save(home, self.tree(), self.step)

    def load(self, home: Path) -> None:
        """Continues from what the folder `home` holds. Raises ValueError if that is another run's."""
        tree = checkpoint.load(home)
        if "search" in tree:
            raise ValueError(f"resume: {str(home)!r} holds a search, expected an optimisation; pass another folder")
        check_same("run", home, self.settings, tree["settings"], self.functions, tree["functions"])
        self.step, self.best_step, self.best_loss = tree["step"], tree["best_step"], tree["best_loss"]
        self.pair_losses = [tuple(pair) for pair in tree["pair_losses"]]
        self.history = list(tree.get("history", []))
        self.update.load(tree["update"])
        device = self.update.latents[0].device
        self.best_latents = [z.to(device) for z in tree["best_latents"]]
        self.best_values = {name: [t.to(device) for t in ts] for name, ts in tree.get("best_values", {}).items()}
        if self.samples is not None:
            self.samples.load(tree["samples"])
        checkpoint.restore_random_state(tree["random"])

    def finish(self, objective: Objective, seen: Evaluation | None = None) -> Result:
        """The result.

        Args:
            objective: Scores the final latents, and the best ones if those are others.
            seen: The losses and images of the current values if the run ended before an update. They have been
                recorded then, and are not computed again.
        """
        x, y = self.update.latents
        values = self.update.values()
        found = objective.score([x, y], values) if seen is None else seen
        history = {name: [terms[name] for terms in self.history] for name in found.terms}
        if self.samples is not None:
            each, images = self.samples.finish(found, [x, y], values, seen is not None, objective.score)
            return self._joined(each, images, found, history)
        best_step, best_loss, best, best_images = self.best_step, self.best_loss, (x, y), found.images
        best_values = values
        if seen is None and found.mean <= best_loss:
            best_step, best_loss = self.step, found.mean
        elif seen is None or best_step != self.step:
            best, best_values = (self.best_latents[0], self.best_latents[1]), self.best_values
            best_images = objective.score([*best], best_values).images
        losses = (self.losses, self.pair_losses, found.mean)
        return Result(
            (x, y), found.images, *losses, best_step, best_loss, best, best_images, history, values, best_values
        )

    def _joined(
        self, each: list[Result], images: tuple[Tensor, ...], found: Evaluation, history: dict[str, list[float]]
    ) -> Result:
        """The result of a batch of optimisations."""
        samples = self.samples
        assert samples is not None
        x, y = self.update.latents
        best = samples.best_latents
        return Result(
            (x, y),
            found.images,
            self.losses,
            self.pair_losses,
            found.mean,
            max(samples.best_steps),
            sum(samples.best_losses) / len(each),
            (best[0], best[1]),
            images,
            history,
            self.update.values(),
            samples.best_values,
            each,
        )
