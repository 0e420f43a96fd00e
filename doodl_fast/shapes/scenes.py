"""Pictures of coloured shapes with captions, on which the embedded pipeline is trained.

A scene has one or two objects on a pale background. Its caption names their colours, shapes and relation ("a red star
left of a blue circle"). The variety of a shape, such as the number of a star's points, or whether a circle is a disc or
a ring, is visible in the picture and never named in the caption. A classifier can therefore guide towards something
that prompts cannot express.
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
"""The direction of the first object as seen from the second, as (x, y), where y points downwards."""

RING_HOLE = 0.55
"""The inner radius of a ring, in units of its outer radius."""

HELD_OUT_PAIRS = frozenset({("purple", "star"), ("yellow", "heart"), ("black", "triangle"), ("green", "circle")})
"""The colours and shapes that the diffusion model never saw together in a picture of two objects. It saw such objects
alone."""


@dataclass(frozen=True)
class Thing:
    """One object as a caption names it, by its colour and its shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Prompt:
    """What a caption says.

    Attributes:
        things: One thing, or two.
        relation: The relation of the first thing to the second, one of `RELATIONS`; None for one thing.
    """

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
        """The layout of a picture of this prompt, which is the same for prompts that say the same in another order.

        The first number is the axis: 0 for one object, 1 for two side by side, 2 for one above the other. Then come the
        colour and the shape of the left or upper object and those of the other one, as indices; a single object stands
        for both.
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
        """Returns the prompt of a caption.

        Raises:
            ValueError: The text is no caption; the error says what captions look like.
        """
        for relation in RELATIONS:
            if f" {relation} " in text:
                left, right = text.split(f" {relation} ", 1)
                return cls((_thing(left, text), _thing(right, text)), relation)
        return cls((_thing(text, text),))


def _thing(words: str, text: str) -> Thing:
    """Returns the thing that some words of a caption name. Raises ValueError if they name none."""
    parts = words.split()
    if len(parts) == 3 and parts[0] == "a" and parts[1] in COLOURS and parts[2] in SHAPES:
        return Thing(parts[1], parts[2])
    raise ValueError(
        f"prompt: expected 'a COLOUR SHAPE' or 'a COLOUR SHAPE RELATION a COLOUR SHAPE' with colours {list(COLOURS)}, "
        f"shapes {list(SHAPES)}, relations {list(RELATIONS)}; got {text!r}"
    )


def prompts(num_objects: int, held_out: bool | None = None) -> Iterator[Prompt]:
    """Yields all prompts with a number of objects.

    Args:
        num_objects: 1 or 2.
        held_out: True for the prompts that training left out, False for those that it saw, None for all.

    Raises:
        ValueError: The number is another.
    """
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
    """One object of a picture.

    Attributes:
        colour: The name of its colour.
        variety: The variety of its shape.
        x: The horizontal coordinate of its centre in pixels.
        y: The vertical coordinate of its centre in pixels, downwards.
        radius: Its radius in pixels.
        angle: The angle by which it is turned, in radians.
        rgb: Its exact colour, from 0 to 255; None for that of the palette.
    """

    colour: str
    variety: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    rgb: tuple[float, float, float] | None = None

    @property
    def thing(self) -> Thing:
        """The object as a caption names it."""
        return Thing(self.colour, SHAPE_OF[self.variety])


@dataclass(frozen=True)
class Scene:
    """A picture that can be drawn, and the prompt that describes it.

    Attributes:
        prompt: The prompt.
        objects: The objects, in the order of the prompt.
        background: The colour of the background, from 0 to 255.
    """

    prompt: Prompt
    objects: tuple[Object, ...]
    background: tuple[float, float, float] = (240.0, 240.0, 236.0)


@cache
def outline(variety: str) -> NDArray[np.float64]:
    """Returns a variety's polygon, of shape (vertices, 2), around its centroid, in units of the object's radius."""
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
    # The unit is the geometric mean of the polygon's reach and the radius of a circle of its area. A thin star may
    # reach further than a disc then, but not so far that it covers its neighbour.
    reach = np.hypot(*(polygon - centroid).T).max()
    return (polygon - centroid) / math.sqrt(reach * math.sqrt(abs(area) / math.pi))


def coverage(variety: str, x: NDArray, y: NDArray, radius: float, angle: float) -> NDArray[np.float64]:
    """Returns the share of each pixel that an object covers, in [0, 1].

    Args:
        variety: The variety of the object's shape.
        x: The horizontal distances of the pixels' centres from that of the object, of any shape.
        y: The vertical distances, of the same shape.
        radius: The radius of the object in pixels.
        angle: The angle by which it is turned, in radians.
    """
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
    """Draws a scene with antialiasing, and returns an array of shape (64, 64, 3), uint8."""
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
    """Returns a random scene.

    Args:
        rng: The random generator.
        num_objects: 1 or 2; None for a random number.
        held_out: Whether to allow the combinations that the training of the diffusion model leaves out.
    """
    count = num_objects or (1 if rng.random() < 0.35 else 2)
    names = list(COLOURS)
    while True:
        things = tuple(Thing(names[rng.integers(len(names))], SHAPES[rng.integers(len(SHAPES))]) for _ in range(count))
        relation = list(RELATIONS)[rng.integers(4)] if count == 2 else None
        prompt = Prompt(things, relation)
        if len(set(things)) == count and (held_out or not prompt.held_out):
            return place(rng, prompt)


def place(rng: np.random.Generator, prompt: Prompt, varieties: tuple[str, ...] | None = None) -> Scene:
    """Returns a scene with the objects of a prompt at random places, apart from each other and inside the picture.

    Args:
        rng: The random generator.
        prompt: The prompt.
        varieties: The variety of each object; None for random ones.
    """
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
