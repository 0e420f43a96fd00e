"""Timesteps as the tensors that a network is given."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

LIMIT = 10**6
"""Timesteps lie below this number, so that the table of them stays small."""


class Timesteps:
    """Turns timesteps into 0-dim tensors on a device, and keeps them, so that a step of a chain costs no transfer."""

    def __init__(self) -> None:
        self._whole: dict[torch.device, Tensor] = {}
        self._fractions: dict[tuple[float, torch.device], Tensor] = {}

    def __call__(self, t: int | float | Tensor, device: torch.device) -> Tensor:
        """The timestep as a 0-dim tensor: int64 where it is whole, else float32. Nothing is ever rounded to an int.

        Args:
            t: A number of at least 0, or a tensor of one element. A tensor of floats is passed on as float32, because
                finding out whether it is whole would wait for the device.
            device: Where the network's input lies.

        Raises:
            TypeError: It is neither a number nor a tensor.
            ValueError: A tensor has more than one element, or a number is negative, infinite or NaN.
        """
        if isinstance(t, Tensor):
            if t.numel() != 1:
                raise ValueError(
                    f"t: expected one timestep for the whole batch, got a tensor of shape {tuple(t.shape)}"
                )
            return t.reshape(()).to(device, torch.float32 if t.is_floating_point() else torch.int64)
        if not isinstance(t, Real):
            raise TypeError(f"t: expected a number or a tensor of one element, got {type(t).__name__}")
        if not 0 <= t < LIMIT:  # This is True for NaN too. A negative index would read the table from its end.
            raise ValueError(f"t: expected a number from 0 to {LIMIT}, got {t!r}")
        if t != int(t):
            return self._fraction(float(t), device)
        return self._table(int(t), device)[int(t)]

    def _table(self, least: int, device: torch.device) -> Tensor:
        """All whole timesteps up to one at least, of which a timestep is a view."""
        table = self._whole.get(device)
        if table is None or least >= len(table):
            # A table made in inference mode could not be used in a later gradient.
            with torch.inference_mode(False):
                table = self._whole[device] = torch.arange(max(1000, least + 1), device=device)
        return table

    def _fraction(self, t: float, device: torch.device) -> Tensor:
        if (t, device) not in self._fractions:
            with torch.inference_mode(False):
                self._fractions[t, device] = torch.tensor(t, dtype=torch.float32, device=device)
        return self._fractions[t, device]
