"""The variable in which a sampler's differential equation is solved, and the timestep that belongs to its values.

In the variables `z = x / signal` and `s = noise / signal` a diffusion is sampled by solving `dz/ds = eps`, in which the
linear part of the equation is gone (Lawson's variables). A flow needs no change of variables: `dx/dsigma = v`.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from ..diffusion.schedule import Schedule
from .coefficients import Level, levels


class Clock:
    """Times, levels and timesteps of a schedule.

    Between the timesteps that are known the timestep is interpolated: over log(s) for a diffusion, whose timesteps in
    training are all known if the schedule was read off a scheduler, and over sigma for a flow. So it may be fractional.

    Args:
        schedule: The noise levels.

    Raises:
        ValueError: The schedule starts from zero terminal signal-to-noise, where s is infinite.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.is_flow = schedule.is_flow
        self.kind = schedule.prediction_type
        if not self.is_flow and schedule.alphas_cumprod[0] == 0:
            raise ValueError(
                f"schedule: expected a signal at every timestep, got alphas_cumprod of 0 at {schedule.timesteps[0]}; "
                "use timestep_spacing='leading', which leaves that timestep out, or another solver"
            )
        known = dict(zip(levels(schedule), schedule.timesteps, strict=False))
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

    def time(self, level: Level) -> float:
        """s of a diffusion, sigma of a flow."""
        return level.noise if self.is_flow else level.noise / level.signal

    def scale(self, level: Level) -> float:
        """What z is multiplied by to give the latent x."""
        return 1.0 if self.is_flow else level.signal

    def level(self, time: float) -> Level:
        """The noise level at a time."""
        if self.is_flow:
            return Level(1 - time, time)
        signal = 1 / math.sqrt(1 + time * time)
        return Level(signal, time * signal)

    def slope(self, level: Level) -> tuple[float, float]:
        """`(p, q)` with `dz/dtime = p x + q network(x)` at a level."""
        if self.kind in ("epsilon", "flow"):
            return 0.0, 1.0
        if self.kind == "v_prediction":
            return level.noise, level.signal
        return 1 / level.noise, -level.signal / level.noise

    def timestep(self, level: Level) -> int | float:
        """What the network is given at a level, at least 0, and whole where it is a known timestep."""
        axis, axes, timesteps = self._axis(level), self._axes, self._timesteps
        if len(axes) == 1 or (self._has_table and not axes[0] < axis < axes[-1]):
            found = timesteps[0] if axis <= axes[0] else timesteps[-1]
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
