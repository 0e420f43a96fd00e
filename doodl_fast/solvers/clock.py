"""The variables in which a sampler's differential equation is solved, and the timesteps that belong to their values.

In each of them the linear part of the equation is gone (Lawson's variables), so a Runge-Kutta scheme approximates what
the network says and nothing else. They have the same solutions, but schemes that can be undone are stable in one and
not in the other, see docs/solvers.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left

from ..diffusion.schedule import FLOW, Schedule
from .coefficients import Level, levels


class Clock(ABC):
    """Times, levels and timesteps of a schedule.

    Between the timesteps that are known the timestep is interpolated: over log(noise / signal) for a diffusion, whose
    timesteps in training are all known if the schedule was read off a scheduler, and over sigma for a flow. So it may
    be fractional.

    Args:
        schedule: The noise levels.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.is_flow = schedule.is_flow
        self.kind = schedule.prediction_type
        self._known = dict(zip(levels(schedule), schedule.timesteps, strict=False))
        known = {level: t for level, t in self._known.items() if self.is_flow or level.signal}
        if self.is_flow:
            known.setdefault(Level(1.0, 0.0), 0)
        table = {
            Level(math.sqrt(alpha), math.sqrt(1 - alpha)): t
            for t, alpha in enumerate(schedule.training_alphas)
            if alpha
        }
        self._has_table = bool(table)
        points = sorted((self._axis(level), float(t)) for level, t in {**table, **known}.items())
        self._axes, self._timesteps = [axis for axis, _ in points], [t for _, t in points]

    @abstractmethod
    def time(self, level: Level) -> float:
        """The time at which the equation passes a noise level."""

    @abstractmethod
    def scale(self, level: Level) -> float:
        """What the equation's variable is multiplied by to give the latent x."""

    @abstractmethod
    def level(self, time: float) -> Level:
        """The noise level at a time."""

    @abstractmethod
    def slope(self, level: Level) -> tuple[float, float]:
        """`(p, q)`: the variable's derivative by time is `p x + q network(x)` at a level."""

    def timestep(self, level: Level) -> int | float:
        """What the network is given at a level, at least 0, and whole where it is a known timestep."""
        if level in self._known:
            return self._known[level]
        axis, axes, timesteps = self._axis(level), self._axes, self._timesteps
        if len(axes) <= 1 or (self._has_table and not axes[0] < axis < axes[-1]):
            ends = timesteps or list(self._known.values())
            found = float(ends[0] if not axes or axis <= axes[0] else ends[-1])
        else:
            upper = min(max(bisect_left(axes, axis), 1), len(axes) - 1)
            share = (axis - axes[upper - 1]) / (axes[upper] - axes[upper - 1])
            found = max(0.0, timesteps[upper - 1] + share * (timesteps[upper] - timesteps[upper - 1]))
        nearest = round(found)
        return nearest if abs(found - nearest) < 1e-9 * max(1, nearest) else found

    def _axis(self, level: Level) -> float:
        """Over what timesteps are interpolated."""
        if self.is_flow:
            return level.noise
        return math.log(level.noise / level.signal) if level.noise else -math.inf


class PictureClock(Clock):
    """`y = x / noise` over `signal / noise`, whose slope is the network's prediction of the picture.

    It passes every level that has noise, also those without a signal.
    """

    def time(self, level: Level) -> float:
        """Signal / noise."""
        return level.signal / level.noise

    def scale(self, level: Level) -> float:
        """The noise."""
        return level.noise

    def level(self, time: float) -> Level:
        """The noise level with this signal / noise."""
        noise = 1 / (1 + time) if self.is_flow else 1 / math.sqrt(1 + time * time)
        return Level(time * noise, noise)

    def slope(self, level: Level) -> tuple[float, float]:
        """The picture by x and the network's output."""
        return {
            "epsilon": lambda: (1 / level.signal, -level.noise / level.signal),
            "v_prediction": lambda: (level.signal, -level.noise),
            "sample": lambda: (0.0, 1.0),
            FLOW: lambda: (1.0, -level.noise),
        }[self.kind]()


class NoiseClock(Clock):
    """`z = x / signal` over `s = noise / signal`, whose slope is the predicted noise eps; for a flow `dx/dsigma = v`.

    It passes every level that has a signal, also those without noise. A flow's passes all.
    """

    def time(self, level: Level) -> float:
        """s of a diffusion, sigma of a flow."""
        return level.noise if self.is_flow else level.noise / level.signal

    def scale(self, level: Level) -> float:
        """The signal of a diffusion, 1 for a flow."""
        return 1.0 if self.is_flow else level.signal

    def level(self, time: float) -> Level:
        """The noise level with this s or sigma."""
        if self.is_flow:
            return Level(1 - time, time)
        signal = 1 / math.sqrt(1 + time * time)
        return Level(signal, time * signal)

    def slope(self, level: Level) -> tuple[float, float]:
        """eps, or a flow's v, by x and the network's output."""
        if self.kind in ("epsilon", FLOW):
            return 0.0, 1.0
        if self.kind == "v_prediction":
            return level.noise, level.signal
        return 1 / level.noise, -level.signal / level.noise
