"""The progress of one optimisation: what is stored after each step, and what the result is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import checkpoint
from .fingerprint import Fingerprint, differing
from .objective import Objective, Scores
from .result import Result
from .update import LatentUpdate


class Progress:
    """Where an optimisation stands.

    Args:
        update: Holds the latents and what their next update needs.
        settings: Plain values that a stored run must have in common with the run that resumes it.
        functions: Identifies the chain, the decoder and the loss, which must be the same too.
    """

    def __init__(self, update: LatentUpdate, settings: dict[str, Any], functions: Fingerprint | None = None) -> None:
        self.update = update
        self.settings = settings
        self.functions = functions or {}
        self.step = 0
        self.pair_losses: list[tuple[float, ...]] = []
        self.best_step = 0
        self.best_loss = float("inf")
        self.best_latents = list(update.latents)

    @property
    def losses(self) -> list[float]:
        """The mean loss of every step so far."""
        return [sum(pair) / len(pair) for pair in self.pair_losses]

    def record(self, losses: tuple[float, ...]) -> None:
        """Notes the losses of the current latents, before their update."""
        self.pair_losses.append(losses)
        if self.losses[-1] < self.best_loss:
            self.best_loss, self.best_step, self.best_latents = self.losses[-1], self.step, list(self.update.latents)

    def tree(self) -> dict[str, Any]:
        """All that `load` needs, with PyTorch's global random state."""
        names = ("settings", "functions", "step", "best_step", "best_loss", "best_latents")
        tree = {name: getattr(self, name) for name in names}
        return {
            **tree,
            "pair_losses": list(self.pair_losses),
            "update": self.update.state(),
            "random": checkpoint.random_state(),
        }

    def save(self, home: Path) -> None:
        """Stores the progress in the folder `home`. Its latents are finite, as `LatentUpdate.step` checks."""
        checkpoint.save(home, self.tree(), self.step)

    def load(self, home: Path) -> None:
        """Continues from what the folder `home` holds. Raises ValueError if that is another run's."""
        tree = checkpoint.load(home)
        for name, value in self.settings.items():
            if tree["settings"].get(name) != value:
                raise ValueError(
                    f"resume: the run in {str(home)!r} had {name}={tree['settings'].get(name)!r}, got {value!r}; "
                    "pass what it was started with, or start anew in another folder"
                )
        differs = differing(self.functions, tree["functions"])
        if differs is not None:
            raise ValueError(
                f"resume: the run in {str(home)!r} differs in its {differs}; pass the same as then, or start anew in "
                "another folder"
            )
        self.step, self.best_step, self.best_loss = tree["step"], tree["best_step"], tree["best_loss"]
        self.pair_losses = [tuple(pair) for pair in tree["pair_losses"]]
        self.update.load(tree["update"])
        self.best_latents = [z.to(self.update.latents[0].device) for z in tree["best_latents"]]
        checkpoint.restore_random_state(tree["random"])

    def finish(self, objective: Objective, seen: Scores | None = None) -> Result:
        """The result.

        Args:
            objective: Scores the final latents, and the best ones if those are others.
            seen: Losses and images of the current latents if a callback ended the run there. They have been recorded
                then, and are not computed again.
        """
        x, y = self.update.latents
        losses, images = objective.value((x, y)) if seen is None else seen
        final = sum(losses) / len(losses)
        best_step, best_loss, best, best_images = self.best_step, self.best_loss, (x, y), images
        if seen is None and final <= best_loss:
            best_step, best_loss = self.step, final
        elif seen is None or best_step != self.step:
            best = (self.best_latents[0], self.best_latents[1])
            _, best_images = objective.value(best)
        return Result((x, y), images, self.losses, self.pair_losses, final, best_step, best_loss, best, best_images)
