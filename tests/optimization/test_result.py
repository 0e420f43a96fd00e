"""What an optimisation returns can be saved, and a step waits for the device twice."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_optimize import optimize, quiet_loss
from torch import Tensor

import doodl_fast
from doodl_fast.diffusion.images import ImageTensor


def test_pictures_save_themselves(tmp_path: Path) -> None:
    seen: list[doodl_fast.StepInfo] = []
    result = optimize(decode=lambda z: z[:, :3], loss=quiet_loss, callback_on_step_end=seen.append)
    for images in (*result.images, *result.best_images, *seen[0].images):
        assert isinstance(images, ImageTensor) and images.shape == (2, 3, 5, 5)
    result.images[0].save(tmp_path / "dog.png")
    assert (tmp_path / "dog.png").stat().st_size > 0


def test_other_shapes_stay_plain_tensors() -> None:
    assert {type(images) for images in optimize(num_optimization_steps=1).images} == {Tensor}


@pytest.mark.parametrize("options", [{}, {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}])
def test_a_step_waits_for_the_device_twice(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For losses and for gradients, by these methods. The chain, the decoder and the loss of this test do not wait."""
    waits, at_steps = 0, []

    def counted(name: str) -> Any:
        real = getattr(Tensor, name)

        def method(self: Tensor, *args: Any) -> Any:
            nonlocal waits
            waits += 1
            return real(self, *args)

        return method

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    optimize(
        chain=lambda x, y: (2 * x, 3 * y),
        loss=quiet_loss,
        callback_on_step_end=lambda info: at_steps.append(waits),
        num_optimization_steps=4,
        **options,
    )
    assert {later - earlier for earlier, later in itertools.pairwise(at_steps)} == {2}
