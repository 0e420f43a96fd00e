"""Captions that are wrong in one respect, which training and evaluation compare with the right ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .scenes import COLOURS, RELATIONS, SHAPES, Prompt, Thing


def confusions(rng: np.random.Generator, caption: str, unchanged: bool = False) -> list[str]:
    """Returns captions that differ from the given one in a single respect.

    Such captions, used as negatives, teach CLIP which colour belongs to which shape. For two objects the changes are,
    in this order: the first colour, the first shape, the second colour, the second shape, the objects swapped, the
    colours swapped, another relation, and the first object alone.

    Args:
        rng: The random generator that chooses the other colours, shapes and relations.
        caption: The right caption.
        unchanged: Whether to keep captions that equal the right one, as when two equal colours are swapped.
    """
    prompt = Prompt.parse(caption)
    first, *rest = prompt.things

    def other(options: Iterable[str], current: str | None) -> str:
        return str(rng.choice([o for o in options if o != current]))

    def recoloured(thing: Thing) -> Thing:
        return Thing(other(COLOURS, thing.colour), thing.shape)

    def reshaped(thing: Thing) -> Thing:
        return Thing(thing.colour, other(SHAPES, thing.shape))

    if rest:
        second, relation = rest[0], prompt.relation
        swapped = (Thing(second.colour, first.shape), Thing(first.colour, second.shape))
        changed = [
            Prompt((recoloured(first), second), relation),
            Prompt((reshaped(first), second), relation),
            Prompt((first, recoloured(second)), relation),
            Prompt((first, reshaped(second)), relation),
            Prompt((second, first), relation),
            Prompt(swapped, relation),
            Prompt(prompt.things, other(RELATIONS, relation)),
            Prompt((first,)),
        ]
    else:
        company = Thing(other(COLOURS, None), other(SHAPES, None))
        changed = [Prompt((recoloured(first),)), Prompt((reshaped(first),)), Prompt((first, company), "left of")]
    return [str(c) for c in changed if unchanged or c != prompt]
