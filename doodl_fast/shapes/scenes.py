"""Captioned pictures of coloured shapes: the world that the embedded pipeline is trained on.

A scene holds one or two objects on a pale background. Its caption names colour, shape and relation ("a red star left of
a blue circle"); the *variety* of a shape (how many points a star has, whether a circle is a disc or a ring) shows in
the picture but never in the caption, so that a classifier has something fine-grained to steer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 64

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "yellow": (245, 196, 40),
    "green": (46, 160, 84),
    "blue": (46, 98, 214),
    "purple": (142, 68, 173),
    "black": (38, 40, 48),
}
VARIETIES: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "ring"),
    "square": ("upright square", "diamond"),
    "triangle": ("triangle up", "triangle down"),
    "star": ("4-pointed star", "5-pointed star", "6-pointed star", "8-pointed star"),
    "heart": ("heart",),
}
SHAPES = tuple(VARIETIES)
VARIETY_NAMES = tuple(variety for varieties in VARIETIES.values() for variety in varieties)
SHAPE_OF = {variety: shape for shape, varieties in VARIETIES.items() for variety in varieties}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""relation -> direction of the first object seen from the second, in pixels (y grows downwards)"""

RING_HOLE = 0.55
"""inner radius of a ring, in units of its outer radius"""

HELD_OUT_PAIRS = frozenset({("purple", "star"), ("yellow", "heart"), ("black", "triangle"), ("green", "circle")})
"""(colour, shape) pairs that the diffusion model never saw in a picture of two objects (it saw them alone)"""


@dataclass(frozen=True)
class Thing:
    """One object as a caption names it."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Prompt:
    """What a caption says: one thing, or two with a relation."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def __str__(self) -> str:
        return f" {self.relation} ".join(map(str, self.things)) if self.relation else str(self.things[0])

    @property
    def held_out(self) -> bool:
        """Whether the diffusion model's training left this combination out."""
        return len(self.things) == 2 and any((t.colour, t.shape) in HELD_OUT_PAIRS for t in self.things)

    @property
    def layout(self) -> tuple[int, int, int, int, int]:
        """What a picture of it shows, however it is said: axis (0 alone, 1 side by side, 2 one above the other), then
        colour and shape, as indices, of the left or upper object and of the other one (of the only one, twice).
        """
        dx, dy = RELATIONS[self.relation] if self.relation else (0, 0)
        near, far = self.things[0], self.things[-1]
        if dx + dy > 0:
            near, far = far, near
        names = list(COLOURS)
        places = [index for t in (near, far) for index in (names.index(t.colour), SHAPES.index(t.shape))]
        return (abs(dx) + 2 * abs(dy), places[0], places[1], places[2], places[3])

    @classmethod
    def parse(cls, text: str) -> Prompt:
        """Reads a caption back. Raises ValueError, naming what can be said, for any other text."""
        for relation in RELATIONS:
            if f" {relation} " in text:
                left, right = text.split(f" {relation} ", 1)
                return cls((_thing(left, text), _thing(right, text)), relation)
        return cls((_thing(text, text),))


def _thing(words: str, text: str) -> Thing:
    parts = words.split()
    if len(parts) == 3 and parts[0] == "a" and parts[1] in COLOURS and parts[2] in SHAPES:
        return Thing(parts[1], parts[2])
    raise ValueError(
        f"prompt: expected 'a COLOUR SHAPE' or 'a COLOUR SHAPE RELATION a COLOUR SHAPE' with colours {list(COLOURS)}, "
        f"shapes {list(SHAPES)}, relations {list(RELATIONS)}; got {text!r}"
    )


def prompts(num_objects: int, held_out: bool | None = None) -> Iterator[Prompt]:
    """All prompts with one or two objects; ``held_out`` keeps those that training left out (True) or saw (False)."""
    if num_objects not in (1, 2):
        raise ValueError(f"num_objects: expected 1 or 2, got {num_objects!r}")
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    for first in things:
        if num_objects == 1:
            if not held_out:
                yield Prompt((first,))
            continue
        for second in things:
            if first != second:
                for relation in RELATIONS:
                    prompt = Prompt((first, second), relation)
                    if held_out is None or prompt.held_out == held_out:
                        yield prompt


@dataclass(frozen=True)
class Object:
    """One drawn object: centre and radius in pixels, angle in radians."""

    colour: str
    variety: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    rgb: tuple[float, float, float] | None = None
    """exact colour in [0, 255]; None for the palette's"""

    @property
    def thing(self) -> Thing:
        return Thing(self.colour, SHAPE_OF[self.variety])


@dataclass(frozen=True)
class Scene:
    """A picture to draw, and the prompt that describes it."""

    prompt: Prompt
    objects: tuple[Object, ...]
    background: tuple[float, float, float] = (240.0, 240.0, 236.0)


@cache
def outline(variety: str) -> NDArray[np.float64]:
    """The variety's polygon, (vertices, 2), centred on its centroid, in units of the object's radius."""
    if SHAPE_OF[variety] == "star":
        points = int(variety[0])
        inner = {4: 0.42, 5: 0.45, 6: 0.55, 8: 0.62}[points]
        angles = np.arange(2 * points) * math.pi / points - math.pi / 2
        radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
        polygon = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    elif variety == "heart":
        t = np.linspace(0, 2 * math.pi, 28, endpoint=False)
        polygon = np.stack(
            [16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1
        )
    else:
        corners, start = {
            "disc": (40, 0.0),
            "ring": (40, 0.0),
            "upright square": (4, math.pi / 4),
            "diamond": (4, 0.0),
            "triangle up": (3, -math.pi / 2),
            "triangle down": (3, math.pi / 2),
        }[variety]
        angles = np.arange(corners) * 2 * math.pi / corners + start
        polygon = np.stack([np.cos(angles), np.sin(angles)], 1)
    x, y = polygon.T
    nx, ny = np.roll(polygon, -1, 0).T
    cross = x * ny - nx * y
    area = cross.sum() / 2
    centroid = np.array([((x + nx) * cross).sum(), ((y + ny) * cross).sum()]) / (6 * area)
    # Halfway between equal reach and equal area: a thin star may reach further than a disc, but not swallow its
    # neighbour.
    reach = np.hypot(*(polygon - centroid).T).max()
    return (polygon - centroid) / math.sqrt(reach * math.sqrt(abs(area) / math.pi))


def coverage(variety: str, x: NDArray, y: NDArray, radius: float, angle: float) -> NDArray[np.float64]:
    """How much of each pixel the object covers, in [0, 1]; x and y are pixel centres relative to the object's."""
    if SHAPE_OF[variety] == "circle":
        from_centre = np.hypot(x, y)
        hole = np.clip(0.5 + RING_HOLE * radius - from_centre, 0, 1) if variety == "ring" else 0.0
        return np.clip(0.5 + radius - from_centre, 0, 1) * (1 - hole)
    cos, sin = math.cos(angle), math.sin(angle)
    polygon = outline(variety) @ np.array([[cos, sin], [-sin, cos]]) * radius
    points = np.stack([x, y], -1)[..., None, :]
    edge = np.roll(polygon, -1, 0) - polygon
    offset = points - polygon
    along = np.clip((offset * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    distance = np.sqrt(((offset - along[..., None] * edge) ** 2).sum(-1).min(-1))
    ends_y, crossing = polygon[:, 1] + edge[:, 1], edge[:, 0] * offset[..., 1] - edge[:, 1] * offset[..., 0]
    upward = (polygon[:, 1] <= points[..., 1]) & (ends_y > points[..., 1]) & (crossing > 0)
    downward = (polygon[:, 1] > points[..., 1]) & (ends_y <= points[..., 1]) & (crossing < 0)
    inside = upward.sum(-1) != downward.sum(-1)
    return np.clip(0.5 + np.where(inside, distance, -distance), 0, 1)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draws a scene: (64, 64, 3) uint8, antialiased."""
    picture = np.empty((SIZE, SIZE, 3))
    picture[:] = scene.background
    for thing in scene.objects:
        reach = 2.0 * thing.radius + 2
        y0, y1 = max(0, int(thing.y - reach)), min(SIZE, int(thing.y + reach) + 1)
        x0, x1 = max(0, int(thing.x - reach)), min(SIZE, int(thing.x + reach) + 1)
        ys, xs = np.mgrid[y0:y1, x0:x1] + 0.5
        alpha = coverage(thing.variety, xs - thing.x, ys - thing.y, thing.radius, thing.angle)[..., None]
        colour = np.array(thing.rgb or COLOURS[thing.colour], dtype=float)
        picture[y0:y1, x0:x1] += alpha * (colour - picture[y0:y1, x0:x1])
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """Converts rendered pictures to tensors.

    Args:
        pictures: Pictures of shape (N, 64, 64, 3), uint8.

    Returns:
        A float32 tensor of shape (N, 3, 64, 64) in [-1, 1], with channels last in memory.
    """
    import torch

    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def sample(rng: np.random.Generator, num_objects: int | None = None, held_out: bool = False) -> Scene:
    """Draws a random scene; ``held_out=True`` allows the combinations that the diffusion model must not see."""
    count = num_objects or (1 if rng.random() < 0.35 else 2)
    names = list(COLOURS)
    while True:
        things = tuple(Thing(names[rng.integers(len(names))], SHAPES[rng.integers(len(SHAPES))]) for _ in range(count))
        relation = list(RELATIONS)[rng.integers(4)] if count == 2 else None
        prompt = Prompt(things, relation)
        if len(set(things)) == count and (held_out or not prompt.held_out):
            return place(rng, prompt)


def place(rng: np.random.Generator, prompt: Prompt, varieties: tuple[str, ...] | None = None) -> Scene:
    """Puts the prompt's objects into a picture at random, apart from each other and inside the frame."""
    count = len(prompt.things)
    chosen = varieties or tuple(VARIETIES[t.shape][rng.integers(len(VARIETIES[t.shape]))] for t in prompt.things)
    while True:
        radii = rng.uniform(11, 15.5, 1) if count == 1 else rng.uniform(8, 11, 2)
        reach = [r * np.hypot(*outline(v).T).max() for r, v in zip(radii, chosen, strict=True)]
        centres = SIZE / 2 + rng.uniform(-6, 6, (count, 2))
        if prompt.relation:
            direction = np.array(RELATIONS[prompt.relation])
            centres += np.outer([1, -1], direction) * rng.uniform(12.5, 16)
        framed = all((c - r > 1).all() and (c + r < SIZE - 1).all() for c, r in zip(centres, reach, strict=True))
        if framed and (count == 1 or np.hypot(*(centres[0] - centres[1])) > sum(reach) + 1):
            break
    objects = tuple(
        Object(
            t.colour,
            variety,
            float(c[0]),
            float(c[1]),
            float(r),
            float(rng.uniform(-0.12, 0.12)),
            tuple(np.clip(np.array(COLOURS[t.colour]) + rng.normal(0, 5, 3), 0, 255).tolist()),
        )
        for t, variety, c, r in zip(prompt.things, chosen, centres, radii, strict=True)
    )
    level = rng.uniform(226, 250)
    return Scene(prompt, objects, tuple(np.clip(level + rng.uniform(-5, 5, 3), 0, 255).tolist()))
