"""The guides: for a batch of pictures the loss of each, so that a batch holds independent optimisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from doodl_fast import guidance, shapes
from doodl_fast.guidance.clip import spherical_distance
from doodl_fast.guidance.noise import chi_log_density
from doodl_fast.shapes.scenes import pixels

from .tasks import Case, rule, target_picture

Values = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) -> the loss of each, (B,)."""
RIDGE = 1e-4
LOW, SPAN = 1.0, 9.0
"""Scores go from 1 to 10 as those of LAION's aesthetic heads; the rule goes from 0 to 1."""


def train_head(clip: tuple[Any, Any], count: int, seed: int = 0) -> tuple[Tensor, dict[str, float]]:
    """Trains the aesthetic head: ridge regression of the rule on CLIP's embeddings of drawn scenes, in closed form.

    Args:
        clip: The CLIP model and its processor, on the CPU, so that the head is the same for all devices.
        count: How many scenes it is trained on. Half as many are left out of training and measured.
        seed: Of the scenes.

    Returns:
        The weights (D + 1,) in float64, of which the last one is the bias, and what is known of the head: "r2", the
        share of the variance that it explains on scenes that it was not trained on.
    """
    rng = np.random.default_rng(seed)
    drawn = [shapes.render(shapes.sample(rng, 2, held_out=True)) for _ in range(count + count // 2)]
    wanted = torch.tensor([rule(picture) for picture in drawn], dtype=torch.float64)
    look = guidance.ClipText(*clip, "a red circle").look
    with torch.no_grad():
        parts = [look(pixels(np.stack(drawn[i : i + 100]))) for i in range(0, len(drawn), 100)]
    x = F.normalize(torch.cat(parts).double(), dim=-1)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    fit, rest = x[:count], x[count:]
    penalty = RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(fit.T @ fit / count + penalty, fit.T @ wanted[:count] / count)
    left = wanted[count:]
    r2 = 1 - ((rest @ weights - left) ** 2).mean() / left.var(correction=0)
    return weights, {"r2": float(r2)}


class Guides:
    """Makes the losses of all tasks.

    Args:
        device: Where they are computed.
        head: The weights of the aesthetic head.
    """

    def __init__(self, device: torch.device, head: Tensor) -> None:
        self.clip = shapes.load_clip(device)
        self.classifier = shapes.load_classifier(device)
        self.head = head.to(device, torch.float32)
        self._targets: dict[Case, Tensor] = {}

    def of(self, cases: Sequence[Case]) -> Values:
        """The losses of a batch of one task, one for each case."""
        task = cases[0].task
        if task == "variety":
            classifier = guidance.Classifier(*self.classifier, 0)
            names = [str(case.variety) for case in cases]
            index = guidance.classifier.find_label
            known = self.classifier[0].config.id2label
            labels = torch.tensor([index(name, known) for name in names]).to(self.head.device)
            return lambda images: F.cross_entropy(classifier.logits(images), labels, reduction="none")
        look = guidance.ClipText(*self.clip, "a red circle").look
        if task == "aesthetic":
            weight, bias = self.head[:-1], self.head[-1]
            return lambda images: -(LOW + SPAN * (F.normalize(look(images), dim=-1) @ weight + bias))
        targets = torch.cat([self._target(case) for case in cases])
        return lambda images: spherical_distance(look(images), targets)

    def _target(self, case: Case) -> Tensor:
        """CLIP's embedding of what a case aims at, (1, D)."""
        if case not in self._targets:
            if case.task == "text":
                self._targets[case] = guidance.ClipText(*self.clip, case.prompt).target
            else:
                picture = target_picture(case).to(self.head.device)
                self._targets[case] = guidance.ClipImage(self.clip[0], picture, self.clip[1]).target
        return self._targets[case]


class SampleLosses:
    """The sum of the losses of a batch, for `optimize`: its gradient with respect to a sample is that sample's own.

    Args:
        values: Gives the loss of each picture.

    Attributes:
        seen: The losses of the latest calls, without a graph.
    """

    def __init__(self, values: Values) -> None:
        self.values = values
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        """The sum of the losses of pictures (B, 3, H, W)."""
        found = self.values(images)
        self.seen.append(found.detach())
        return found.sum()

    def take(self) -> Tensor:
        """The mean losses (B,) over the calls since the last time: one call, or one for each of EDICT's pictures."""
        found = torch.stack(self.seen).mean(0)
        self.seen.clear()
        return found


class LikelyLosses(SampleLosses):
    """The same with ReNO's regulariser of the starting noise (arXiv 2406.04312), which is not part of `seen`.

    Args:
        values: Gives the loss of each picture.
        weight: How much the regulariser counts.
    """

    def __init__(self, values: Values, weight: float) -> None:
        super().__init__(values)
        self.weight = weight

    def __call__(self, images: Tensor, *, start: Tensor) -> Tensor:  # type: ignore[override]
        """The sum of the losses of pictures (B, 3, H, W) made of starting latents (B, C, h, w)."""
        return super().__call__(images) - self.weight * chi_log_density(start).sum()
