"""Reads shapes, colours and relations off the pixels of a picture, without any network.

A network that guided a picture cannot judge it fairly. This measure knows only geometry. It takes the median of the
border as the background, groups the pixels that differ from it into connected regions, and compares the outline of each
region with those of all varieties, by the intersection over union of normalised masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .scenes import COLOURS, RELATIONS, SHAPE_OF, VARIETY_NAMES, Prompt, Thing, coverage

CONTRAST = 0.16
"""The distance from the background at which a pixel belongs to an object, as a share of the RGB cube's diagonal."""
MIN_AREA = 24
"""The number of pixels that a region must have to be an object."""
MIN_IOU = 0.72
"""The intersection over union that a region must have with an outline to be of its shape."""
MAX_COLOUR_DISTANCE = 75.0
"""The largest distance of a region from a colour of the palette that it may have, Euclidean, in RGB from 0 to 255."""
GRID = 36
"""The side of a normalised mask. The circle of the object's area has the radius GRID / 5 in it."""


@dataclass(frozen=True)
class Reading:
    """One object that was found in a picture.

    Attributes:
        colour: The name of its colour; None if no colour fits.
        shape: The name of its shape; None if no outline fits.
        variety: The variety of its shape; None if no outline fits.
        x: The horizontal coordinate of its centre in pixels.
        y: The vertical coordinate of its centre in pixels, downwards.
        area: Its area in pixels.
        iou: The intersection over union with the best outline.
    """

    colour: str | None
    shape: str | None
    variety: str | None
    x: float
    y: float
    area: float
    iou: float


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a picture with a prompt.

    Attributes:
        score: The share of the prompt's attributes that the picture has.
        faults: The kinds of attributes that it does not have: "colour", "shape", "relation", "variety", "number".
        readings: The objects that were found.
    """

    score: float
    faults: tuple[str, ...]
    readings: tuple[Reading, ...]

    @property
    def correct(self) -> bool:
        """Whether the picture has every attribute of the prompt."""
        return not self.faults


def as_pixels(image: object) -> NDArray[np.float64]:
    """Returns the pixels of a picture as floats from 0 to 255, of shape (H, W, 3).

    Args:
        image: A PIL picture, a uint8 array of shape (H, W, 3), or a tensor of shape (3, H, W) in [-1, 1].

    Raises:
        ValueError: The picture has another shape or dtype.
    """
    if hasattr(image, "detach"):
        array = np.asarray(image.detach().float().cpu())
        if array.ndim != 3 or array.shape[0] != 3:
            raise ValueError(f"image: expected a (3, H, W) tensor in [-1, 1], got shape {tuple(array.shape)}")
        return (array.transpose(1, 2, 0).clip(-1, 1) + 1) * 127.5
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"image: expected (H, W, 3) uint8, got {array.dtype} {array.shape}; convert with PIL's .convert('RGB')"
        )
    return array.astype(float)


def read(image: object) -> tuple[Reading, ...]:
    """Returns all objects in a picture, the largest first. `as_pixels` says what a picture may be."""
    pixels = as_pixels(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, 0)
    distance = np.sqrt(((pixels - background) ** 2).sum(-1))
    readings = [_read_region(pixels, distance, region) for region in _regions(distance > CONTRAST * 441)]
    return tuple(sorted(readings, key=lambda r: -r.area))


def judge(image: object, prompt: Prompt | str, variety: str | None = None) -> Verdict:
    """Compares a picture with a prompt: the number of objects, each colour and shape, and the relation of the centres.

    Args:
        image: The picture; `as_pixels` says what it may be.
        prompt: The prompt, or its text.
        variety: A variety that the first object must have as well.

    Raises:
        ValueError: The text is no prompt, or the picture has another shape or dtype.
    """
    wanted = Prompt.parse(prompt) if isinstance(prompt, str) else prompt
    found = read(image)
    matched = _match(wanted, found)
    checks = [("colour", r is not None and r.colour == t.colour) for t, r in matched]
    checks += [("shape", r is not None and r.shape == t.shape) for t, r in matched]
    if wanted.relation:
        (_, a), (_, b) = matched
        checks.append(("relation", a is not None and b is not None and related(a, b, wanted.relation)))
    if variety is not None:
        one = matched[0][1]
        checks.append(("variety", one is not None and one.variety == variety))
    checks.append(("number", len(found) == len(wanted.things)))
    faults = dict.fromkeys(name for name, holds in checks if not holds)
    return Verdict(sum(holds for _, holds in checks) / len(checks), tuple(faults), found)


def related(a: Reading, b: Reading, relation: str) -> bool:
    """Returns whether the centre of a lies in the direction of a relation from that of b, and less far sideways."""
    dx, dy = a.x - b.x, a.y - b.y
    ux, uy = RELATIONS[relation]
    along, across = dx * ux + dy * uy, abs(dx * uy) + abs(dy * ux)
    return along > across


def _match(prompt: Prompt, found: tuple[Reading, ...]) -> list[tuple[Thing, Reading | None]]:
    """Assigns objects to the things that a prompt names, so that most attributes and the relation hold."""
    padded: list[Reading | None] = [*found[:4], *[None] * len(prompt.things)]
    options: list[list[Reading | None]]
    if len(prompt.things) == 1:
        options = [[r] for r in padded]
    else:
        options = [[a, b] for i, a in enumerate(padded) for j, b in enumerate(padded) if i != j]

    def quality(option: list[Reading | None]) -> float:
        same = sum(
            (r is not None) * 0.1 + (r is not None and r.colour == t.colour) + (r is not None and r.shape == t.shape)
            for t, r in zip(prompt.things, option, strict=True)
        )
        if prompt.relation and option[0] and option[1]:
            same += 0.5 * related(option[0], option[1], prompt.relation)
        return same

    best = max(options, key=quality)
    return list(zip(prompt.things, best, strict=True))


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Returns the 4-connected regions of at least MIN_AREA pixels, as masks of the picture's shape."""
    todo = mask.copy()
    height, width = mask.shape
    regions = []
    while todo.any():
        seed = divmod(int(todo.argmax()), width)
        region = np.zeros_like(mask)
        stack = [seed]
        todo[seed] = False
        while stack:
            y, x = stack.pop()
            region[y, x] = True
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < height and 0 <= u < width and todo[v, u]:
                    todo[v, u] = False
                    stack.append((v, u))
        if region.sum() >= MIN_AREA:
            regions.append(region)
    return regions


def _read_region(pixels: NDArray, distance: NDArray, region: NDArray[np.bool_]) -> Reading:
    """Measures the colour, the shape and the place of one region."""
    core = region & (distance >= 0.8 * np.percentile(distance[region], 75))
    rgb = np.median(pixels[core], 0)
    contrast = np.median(distance[core])
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), dtype=float)
    gaps = np.sqrt(((palette - rgb) ** 2).sum(-1))
    colour = names[int(gaps.argmin())] if gaps.min() <= MAX_COLOUR_DISTANCE else None
    # The occupancy is the share of each pixel that the object covers. Pixels at its rim are below the contrast
    # threshold, so a rim of one pixel is added to the region.
    rim = region | np.pad(region, 1)[2:, 1:-1] | np.pad(region, 1)[:-2, 1:-1] | np.pad(region, 1)[1:-1, 2:]
    rim |= np.pad(region, 1)[1:-1, :-2]
    occupancy = np.clip(distance / contrast, 0, 1) * rim
    area = occupancy.sum()
    ys, xs = np.mgrid[: region.shape[0], : region.shape[1]] + 0.5
    x, y = (occupancy * xs).sum() / area, (occupancy * ys).sum() / area
    mask = _normalise(occupancy, x, y, math.sqrt(area / math.pi))
    templates = _templates()
    iou = np.minimum(templates, mask).sum((-1, -2)) / np.maximum(templates, mask).sum((-1, -2))
    best = int(iou.max(1).argmax())
    fits = iou[best].max() >= MIN_IOU
    variety = VARIETY_NAMES[best] if fits else None
    return Reading(colour, SHAPE_OF[variety] if variety else None, variety, x, y, float(area), float(iou[best].max()))


def _normalise(occupancy: NDArray, x: float, y: float, radius: float) -> NDArray[np.float64]:
    """Resamples a region bilinearly, so that it is centred and has the area of a circle of radius GRID / 5."""
    step = radius / (GRID / 5)
    offsets = (np.arange(GRID) + 0.5 - GRID / 2) * step
    padded = np.pad(occupancy, 2)
    rows = np.clip(y + offsets - 0.5 + 2, 0, padded.shape[0] - 1.001)
    columns = np.clip(x + offsets - 0.5 + 2, 0, padded.shape[1] - 1.001)
    r0, c0 = rows.astype(int), columns.astype(int)
    fr, fc = (rows - r0)[:, None], (columns - c0)[None, :]
    top = padded[np.ix_(r0, c0)] * (1 - fc) + padded[np.ix_(r0, c0 + 1)] * fc
    bottom = padded[np.ix_(r0 + 1, c0)] * (1 - fc) + padded[np.ix_(r0 + 1, c0 + 1)] * fc
    return top * (1 - fr) + bottom * fr


@cache
def _templates() -> NDArray[np.float64]:
    """Returns all outlines, drawn at several angles and normalised like regions: (varieties, angles, GRID, GRID)."""
    size, radius = 96, 24.0
    ys, xs = np.mgrid[:size, :size] + 0.5
    stacks = []
    for variety in VARIETY_NAMES:
        drawn = []
        for angle in np.deg2rad(np.arange(-12, 13, 4)):
            mask = coverage(variety, xs - size / 2, ys - size / 2, radius, float(angle))
            area = mask.sum()
            x, y = (mask * xs).sum() / area, (mask * ys).sum() / area
            drawn.append(_normalise(mask, x, y, math.sqrt(area / math.pi)))
        stacks.append(drawn)
    return np.array(stacks)
