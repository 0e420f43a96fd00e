"""Timesteps that make no sense are refused by name; a negative one must not read the table from its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from doodl_fast.diffusion.denoiser import Denoiser


@pytest.mark.parametrize(
    ("t", "error", "got"),
    [
        (-1, ValueError, "got -1"),
        (-0.5, ValueError, r"got -0\.5"),
        (float("nan"), ValueError, "got nan"),
        (float("inf"), ValueError, "got inf"),
        (10**30, ValueError, "got 10"),
        ("a", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_timestep_is_refused(t: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error, match=f"t: expected a number .*{got}"):
        Denoiser(lambda x, t, cond: x, None)(torch.zeros(1, 3), t)
