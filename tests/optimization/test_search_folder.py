"""A search for the best of many starts that is stored after every start, and continued after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from doodl_fast.guidance import Symmetry
from doodl_fast.optimization import optimize, search

START = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def chain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * x, 0.25 * y


class Noisy:
    """A loss that draws from the global generator, and is interrupted at one of its calls."""

    def __init__(self, last: int | None = None) -> None:
        self.calls, self.last = 0, last

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.last is not None and self.calls > self.last:
            raise KeyboardInterrupt
        return (images - 0.1).square().mean() + 0.05 * torch.rand(())


def found(loss: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    return search(chain, START, None, loss, best_of=6, seed=1, **options)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("calls", [1, 5, 8])
def test_a_continued_search_is_the_uninterrupted_one(tmp_path: Path, calls: int, per_sample: bool) -> None:
    whole = found(Noisy(), per_sample=per_sample)
    with pytest.raises(KeyboardInterrupt):
        found(Noisy(calls), per_sample=per_sample, folder=tmp_path)
    stored = (tmp_path / "state.json").exists()
    assert stored == (calls > (4 if per_sample else 2) - 1)
    rest = Noisy()
    again = found(rest, per_sample=per_sample, folder=tmp_path, resume=stored)
    assert again.losses == whole.losses and again.best == whole.best and again.loss == whole.loss
    assert all(
        torch.equal(a, b) for a, b in zip(again.latents + again.images, whole.latents + whole.images, strict=True)
    )
    assert rest.calls < (28 if per_sample else 14) or not stored  # what was scored is not scored again


def test_a_longer_search_continues_a_shorter_one(tmp_path: Path) -> None:
    torch.manual_seed(5)
    shorter = search(chain, START, None, Noisy(), best_of=3, folder=tmp_path)
    longer = search(chain, START, None, Noisy(), best_of=5, folder=tmp_path, resume=True)
    assert longer.losses[:3] == shorter.losses and len(longer.losses) == 5


def test_what_is_refused(tmp_path: Path) -> None:
    found(Noisy(), folder=tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        found(Noisy(), folder=tmp_path)
    with pytest.raises(ValueError, match="had seed=1, got 2"):
        search(chain, START, None, Noisy(), best_of=6, seed=2, folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match="differs in its loss"):
        search(chain, START, None, Symmetry(), best_of=6, seed=1, folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match="holds a search, expected an optimisation"):
        optimize(chain, START, None, Noisy(), 1, folder=tmp_path, resume=True)
    optimize(chain, START, None, lambda images: images.mean(), 1, folder=tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="holds an optimisation, expected a search"):
        search(chain, START, None, Noisy(), folder=tmp_path / "other", resume=True)
