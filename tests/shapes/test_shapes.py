"""Pictures of shapes: captions, drawing, and the measure that reads pictures without a network."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from doodl_fast import shapes
from doodl_fast.shapes.measure import as_pixels
from doodl_fast.shapes.scenes import HELD_OUT_PAIRS


def scenes(count: int, seed: int = 0, **options) -> list[shapes.Scene]:
    rng = np.random.default_rng(seed)
    return [shapes.sample(rng, **options) for _ in range(count)]


def test_measure_reads_what_was_drawn() -> None:
    """The measure finds every object of every variety, its colour, its shape and, within a pixel, its place."""
    for scene in scenes(150, held_out=True):
        picture = shapes.render(scene)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        readings = shapes.read(picture)
        assert len(readings) == len(scene.objects)
        for drawn in scene.objects:
            found = min(readings, key=lambda r: np.hypot(r.x - drawn.x, r.y - drawn.y))
            assert (found.colour, found.variety) == (drawn.colour, drawn.variety)
            assert np.hypot(found.x - drawn.x, found.y - drawn.y) < 1.0
        assert shapes.judge(picture, scene.prompt).correct


@pytest.mark.parametrize("noise", [0.03, 0.08])
def test_measure_stands_noise_and_blur(noise: float) -> None:
    rng = np.random.default_rng(1)
    right = 0
    for scene in scenes(60, seed=2):
        picture = torch.from_numpy(shapes.render(scene)).permute(2, 0, 1).float() / 127.5 - 1
        small = torch.nn.functional.avg_pool2d(picture[None], 2)
        blurred = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")[0]
        noisy = blurred + noise * torch.from_numpy(rng.standard_normal(picture.shape)).float()
        right += shapes.judge(noisy, scene.prompt).correct
    assert right >= 54


def test_measure_refuses_wrong_pictures() -> None:
    """A single change of the prompt (colour, shape, relation, order, number) makes the same picture wrong."""
    rng = np.random.default_rng(3)
    prompt = shapes.Prompt.parse("a red star left of a blue circle")
    picture = shapes.render(shapes.place(rng, prompt))
    assert shapes.judge(picture, prompt).correct
    assert shapes.judge(picture, "a blue circle right of a red star").correct
    wrong = [
        "a green star left of a blue circle",
        "a red heart left of a blue circle",
        "a red star left of a yellow circle",
        "a red star left of a blue square",
        "a red star right of a blue circle",
        "a red star above a blue circle",
        "a blue star left of a red circle",
        "a blue circle left of a red star",
        "a red star",
    ]
    for text in wrong:
        verdict = shapes.judge(picture, text)
        assert not verdict.correct, text
        assert 0 <= verdict.score < 1


def test_measure_sees_no_objects_in_nothing() -> None:
    rng = np.random.default_rng(4)
    assert shapes.read(np.full((64, 64, 3), 240, np.uint8)) == ()
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not any(shapes.judge(noise, prompt).correct for prompt in shapes.prompts(1))


def test_varieties_are_told_apart_and_not_named() -> None:
    rng = np.random.default_rng(5)
    for shape, varieties in shapes.VARIETIES.items():
        prompt = shapes.Prompt.parse(f"a red {shape}")
        for variety in varieties:
            picture = shapes.render(shapes.place(rng, prompt, (variety,)))
            for asked in varieties:
                assert shapes.judge(picture, prompt, variety=asked).correct is (asked == variety)
        assert all(variety == shape or variety not in str(prompt) for variety in varieties)


def test_prompts_round_trip_and_hold_some_out() -> None:
    assert len(list(shapes.prompts(1))) == 30 and len(list(shapes.prompts(2))) == 30 * 29 * 4
    for prompt in islice(shapes.prompts(2), 0, None, 37):
        assert shapes.Prompt.parse(str(prompt)) == prompt
    held, seen = set(shapes.prompts(2, held_out=True)), set(shapes.prompts(2, held_out=False))
    assert held and seen and not held & seen
    for scene in scenes(300, seed=6):
        pairs = {(thing.colour, thing.shape) for thing in scene.prompt.things}
        assert len(scene.objects) == 1 or not pairs & HELD_OUT_PAIRS


def test_scenes_are_drawn_from_the_seed_alone() -> None:
    assert scenes(5, seed=7) == scenes(5, seed=7)
    assert scenes(5, seed=7) != scenes(5, seed=8)


@pytest.mark.parametrize("text", ["a cat", "a red star near a blue circle", "red star", "a pink star", ""])
def test_unknown_captions(text: str) -> None:
    with pytest.raises(ValueError, match="prompt: expected 'a COLOUR SHAPE'"):
        shapes.Prompt.parse(text)


def test_image_errors() -> None:
    with pytest.raises(ValueError, match=r"image: expected a \(3, H, W\) tensor"):
        as_pixels(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"image: expected \(H, W, 3\) uint8, got float64"):
        as_pixels(np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="num_objects: expected 1 or 2, got 3"):
        next(shapes.prompts(3))
