"""`Span`: the part of a sampler's steps that a chain makes, where it does not go all the way from noise to picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Which of a scheduler's steps a chain makes, and what it starts from.

    Attributes:
        skip: How many steps are left out at the start: SDEdit (arXiv 2108.01073), diffusers' `strength`.
        below: The first step is the first one whose timestep is below this number; None does not cut.
        down_to: The last step is the last one whose timestep is at least this number; None does not cut.
        from_picture: Whether the chain starts from a picture to which noise was added, and not from noise alone.
        argument: Which argument asked for this part, for errors.
    """

    skip: int = 0
    below: float | None = None
    down_to: float | None = None
    from_picture: bool = False
    argument: str = "strength"

    def steps(self, timesteps: Sequence[float], order: int = 1) -> range:
        """Returns the numbers of the steps that are made.

        Args:
            timesteps: Those of all steps, from noise to picture.
            order: How many calls of the network the scheduler makes for a step: `scheduler.order`.

        Raises:
            ValueError: None is left.
        """
        first, last = self.skip * order, len(timesteps)
        if self.below is not None:
            left = sum(t < self.below for t in timesteps)
            # Of a step that calls the network twice both calls are made.
            left += int(order == 2 and left % 2 == 0)
            first = max(first, last - left)
        if self.down_to is not None:
            end = self.down_to
            last = len(list(itertools.takewhile(lambda t: t >= end, timesteps)))
        if first >= last:
            raise ValueError(f"{self.argument}: leaves none of the {len(timesteps)} steps to do")
        return range(first, last)
