"""Gradients through one call of the network: straight through from the first one, and DRaFT-LV's of the last one."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..chain.chain import Chain
from ..chain.program import Coupling, num_values
from ..diffusion.schedule import Schedule
from .coefficients import levels
from .truncated import Truncation, run_constant, run_part, split, with_linear_gradient


class StraightThrough(Truncation):
    """The picture of the whole chain with the gradient of one step that leads from the start to the picture.

    Every output of the network counts as if it were the first one, so the gradient goes through the first call alone.
    For networks that predict eps or a flow's velocity that is the gradient of a single DDIM (or Euler) step over the
    whole schedule. All other calls cost one evaluation and keep nothing. Conditions get the gradient of the first call.

    Example:
        >>> chain.last_steps = StraightThrough()
    """

    def __repr__(self) -> str:
        return "StraightThrough()"

    def run(self, chain: Chain, schedule: Any, latents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs the program, and its first call of the network once more for the gradient."""
        program = chain.program
        with torch.no_grad():
            values = run_part(chain, program, tuple(latent.detach() for latent in latents), "checkpoint")
        first = next((number for number, coupling in enumerate(program) if coupling.calls_network), None)
        if first is None:
            return with_linear_gradient(program, latents, values)
        call, extra = program[first], num_values(program)
        alone = Coupling(extra, 0.0, 0.0, 1.0, call.step, call.tag, source=call.source)
        part = Chain(chain.evaluator, (*program[:first], alone), state_dtype=chain.state_dtype)
        output = part.run(*latents, torch.zeros_like(latents[0]))[extra]
        return with_linear_gradient(program, latents, values, output)


@dataclass
class LowVariance(Truncation):
    """DRaFT-LV's estimate of the gradient through the last step (Clark et al., arXiv 2309.17400).

    The picture is noised again to the level before the last step, several times with noise of its own, and the gradient
    goes through the network at all of these latents. It is their mean, which varies less than that of `LastSteps(1)`.
    In the steps before, the network's outputs count as constants, as there. The paper evaluates the loss on every copy
    as well; here it is evaluated once, on the picture of the chain.

    Args:
        copies: How many noised copies there are. Each costs one evaluation and one VJP.
        seed: Of their noise, which is drawn anew in every run.

    Raises:
        ValueError: `copies` is below 1.

    Example:
        >>> chain.last_steps = LowVariance(copies=2)
    """

    copies: int = 2
    seed: int = 0
    _random: random.Random = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.copies, bool) or not isinstance(self.copies, int) or self.copies < 1:
            raise ValueError(f"copies: expected an int of at least 1, got {self.copies!r}")
        self._random = random.Random(self.seed)

    def check(self, chain: Chain, schedule: Any) -> None:
        """Raises ValueError unless the last step calls the network once, at a noise level that the schedule tells."""
        calls = sum(coupling.calls_network for coupling in split(chain.program, 1)[1])
        if calls != 1 or not isinstance(schedule, Schedule):
            raise ValueError(
                "last_steps: LowVariance needs a solver that calls the network once in a step between two noise levels "
                f"of its schedule, got {type(chain).__name__}; use DDIM, BDIA or OBELM, or LastSteps(1)"
            )

    def run(self, chain: Chain, schedule: Any, latents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs the program, and its last step once more for each copy."""
        head, tail = split(chain.program, 1)
        before = run_constant(chain, head, latents)
        with torch.no_grad():
            ends = run_part(chain, tail, tuple(value.detach() for value in before), "checkpoint")
        call = next(coupling for coupling in tail if coupling.calls_network)
        picture, source = ends[call.target], before[call.source]
        passed = levels(schedule)[call.step : call.step + 2]
        kept = passed[0].signal / passed[1].signal
        added = math.sqrt(passed[0].noise ** 2 - (kept * passed[1].noise) ** 2)
        found = []
        for _ in range(self.copies):
            generator = torch.Generator().manual_seed(self._random.getrandbits(63))
            noise = torch.randn(picture.shape, generator=generator).to(picture)
            shift = kept * picture + added * noise - source.detach()
            shifted = [value + shift if number == call.source else value for number, value in enumerate(before)]
            found.append(run_part(chain, tail, tuple(shifted), chain.memory))
        means = [torch.stack(copies).mean(0) for copies in zip(*found, strict=True)]
        return tuple(end + (mean - mean.detach()) for end, mean in zip(ends, means, strict=True))
