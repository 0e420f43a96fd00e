"""The training set of the embedded pipeline: pictures, captions and varieties, drawn from a seed, cached on disk."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..scenes import SIZE, VARIETY_NAMES, Prompt, render, sample

CHUNK = 500


@dataclass(frozen=True)
class Pictures:
    """The pictures of the training set.

    Attributes:
        images: The pictures, of shape (N, 64, 64, 3), uint8.
        captions: Their N captions.
        varieties: Of shape (N,): the variety of the only object as an index into `VARIETY_NAMES`; -1 for two objects.
    """

    images: NDArray[np.uint8]
    captions: list[str]
    varieties: NDArray[np.int64]

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """Of shape (N,): whether the training of the UNet leaves the picture out."""
        return np.array([Prompt.parse(caption).held_out for caption in self.captions])

    def __len__(self) -> int:
        return len(self.captions)


def _draw(chunk: tuple[int, int]) -> tuple[NDArray[np.uint8], list[str], list[int]]:
    """Draws the pictures, captions and varieties of one chunk, which is a seed and the chunk's number."""
    seed, index = chunk
    rng = np.random.default_rng([seed, index])
    scenes = [sample(rng, held_out=True) for _ in range(CHUNK)]
    varieties = [VARIETY_NAMES.index(s.objects[0].variety) if len(s.objects) == 1 else -1 for s in scenes]
    return np.stack([render(s) for s in scenes]), [str(s.prompt) for s in scenes], varieties


def pictures(folder: Path, count: int = 40_000, seed: int = 0, workers: int = 2) -> Pictures:
    """Loads the training set from a folder, or draws it, which takes a few minutes, and stores it there.

    Args:
        folder: Where the set is stored, in a file whose name contains seed and count.
        count: The number of pictures.
        seed: The seed of the scenes.
        workers: The number of processes that draw.
    """
    path = folder / f"pictures-{seed}-{count}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_draw, [(seed, i) for i in range(-(-count // CHUNK))]))
        images = np.concatenate([p[0] for p in parts])[:count]
        captions = np.array([c for p in parts for c in p[1]][:count])
        varieties = np.array([v for p in parts for v in p[2]][:count])
        partial = path.with_suffix(".tmp.npz")
        np.savez(partial, images=images, captions=captions, varieties=varieties)
        partial.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        images, varieties = stored["images"], stored["varieties"]
        captions = stored["captions"].tolist()
    assert images.shape[1:] == (SIZE, SIZE, 3)
    return Pictures(images, captions, varieties)
