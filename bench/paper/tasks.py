"""The four tasks of the comparison: prompts, what is aimed at, and how a picture is judged without any network."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doodl_fast import shapes
from doodl_fast.shapes.measure import CONTRAST, as_pixels

TASKS = ("text", "variety", "picture", "aesthetic")
TITLES = {
    "text": "CLIP text, two objects in combinations that training left out",
    "variety": "a variety of a shape that captions have no word for, by a classifier",
    "picture": "a picture as the target, by CLIP",
    "aesthetic": "an aesthetic score, a linear head on CLIP",
}
TUNED_BY = {"text": "score", "variety": "score", "picture": "score", "aesthetic": "success"}
"""What of the judgement a scale is chosen by. In the last task the score is the rule's value alone: it would choose the
scale that raises the rule most, also where the pictures show nothing of the prompt any more."""
SPLITS = ("tune", "test")
DRAWINGS = 40
"""How many drawings of a prompt say what a good value of the rule is for it."""


@dataclass(frozen=True)
class Case:
    """What one picture is to show.

    Attributes:
        task: One of `TASKS`.
        prompt: What the network is given.
        variety: The variety of the shape that is aimed at; None where none is.
    """

    task: str
    prompt: str
    variety: str | None = None

    @property
    def key(self) -> str:
        """A name that no other case of the task has."""
        return self.prompt if self.variety is None else f"{self.prompt} ({self.variety})"


def seed_of(*parts: Any) -> int:
    """A number for a random generator that follows from names and numbers alone."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:7], "little")


def cases(task: str, split: str, count: int) -> list[Case]:
    """The first cases of a split. No case is in both splits.

    Args:
        task: One of `TASKS`.
        split: "tune" or "test".
        count: How many.

    Raises:
        ValueError: The task has fewer.
    """
    found = _all(task)
    np.random.default_rng(seed_of("cases", task)).shuffle(found)  # type: ignore[arg-type]
    third = len(found) // 3
    own = found[:third] if split == "tune" else found[third:]
    if count > len(own):
        raise ValueError(f"--prompts: expected at most {len(own)} for the task {task!r}, split {split!r}, got {count}")
    return own[:count]


def _all(task: str) -> list[Case]:
    if task == "text":
        return [Case(task, str(prompt)) for prompt in shapes.prompts(2, held_out=True)]
    if task == "aesthetic":
        return [Case(task, str(prompt)) for prompt in shapes.prompts(2, held_out=False)]
    return [
        Case(task, f"a {colour} {shape}", variety)
        for colour in shapes.COLOURS
        for shape, varieties in shapes.VARIETIES.items()
        for variety in varieties
        if len(varieties) > 1
    ]


def noise(case: Case, seed: int, draw: int = 0) -> Tensor:
    """Noise (4, 16, 16) in float32 on the CPU, which follows from the case, the seed and the number of the draw."""
    generator = torch.Generator().manual_seed(seed_of(case.task, case.key, seed, draw))
    return torch.randn(4, 16, 16, generator=generator)


def target_picture(case: Case) -> Tensor:
    """The picture (1, 3, 64, 64) that the task "picture" aims at: a drawing of the prompt with the case's variety."""
    rng = np.random.default_rng(seed_of("target", case.key))
    assert case.variety is not None
    scene = shapes.place(rng, shapes.Prompt.parse(case.prompt), (case.variety,))
    return torch.from_numpy(shapes.render(scene).copy()).permute(2, 0, 1)[None] / 127.5 - 1


def rule(image: object) -> float:
    """What the aesthetic head is trained on, contrast: the mean distance of all objects' pixels from the background.

    Args:
        image: A picture as `shapes.judge` takes it.

    Returns:
        The distance as a share of the RGB cube's diagonal; 0 if there is nothing but background.
    """
    pixels = as_pixels(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.sqrt(((pixels - np.median(border, 0)) ** 2).sum(-1)) / 441.0
    mask: NDArray[np.bool_] = distance > CONTRAST
    return float(distance[mask].mean()) if mask.any() else 0.0


@cache
def good(case: Case) -> float:
    """The value of the rule from which a picture has succeeded: the upper quartile of drawings of the same prompt."""
    rng, prompt = np.random.default_rng(seed_of("drawings", case.prompt)), shapes.Prompt.parse(case.prompt)
    return float(np.quantile([rule(shapes.render(shapes.place(rng, prompt))) for _ in range(DRAWINGS)], 0.75))


def judged(pixels: NDArray[np.uint8], case: Case) -> dict[str, Any]:
    """What the measure without networks finds in a picture.

    Args:
        pixels: The picture, (64, 64, 3).
        case: What it is to show.

    Returns:
        "success": 1 if everything is as the case says, and in the task "aesthetic" the rule's value is `good`, else 0;
        "score": the share of attributes that are right, or the rule's value in the task "aesthetic"; "shows": 1 if the
        picture shows the prompt, whatever else is aimed at.
    """
    verdict = shapes.judge(pixels, case.prompt, case.variety)
    prompt = not [fault for fault in verdict.faults if fault != "variety"]
    if case.task != "aesthetic":
        return {"success": int(verdict.correct), "score": verdict.score, "shows": int(prompt)}
    value = rule(pixels)
    return {"success": int(prompt and value >= good(case)), "score": value, "shows": int(prompt)}


def judge_all(work: list[tuple[NDArray[np.uint8], Case]]) -> list[dict[str, Any]]:
    """`judged` for several pictures; a function of its own, so that other processes can call it."""
    return [judged(*one) for one in work]
