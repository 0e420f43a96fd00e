"""Rex for the diffusion SDE (arXiv 2502.08834), with the Brownian motion's increments as differentiable inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..chain.evaluator import Evaluator
from ..chain.latents import check_all
from ..chain.program import Coupling, Program
from ..diffusion.schedule import Schedule
from .clock import NoiseClock, PictureClock
from .coefficients import Level, levels
from .rex import Rex, check_options, step_couplings
from .runge_kutta import RungeKuttaSlope, Stages
from .step_noise import draw_noise

_GIVEN: ContextVar[tuple[Tensor, ...] | None] = ContextVar("noise", default=None)
"""The noise of the call that is being made in this thread."""


class SnrClock(PictureClock):
    """`u = signal / noise^2 x` over `q = (signal / noise)^2`, in which the reverse SDE is `du = picture dq + dW`."""

    def time(self, level: Level) -> float:
        """(Signal / noise)^2."""
        return super().time(level) ** 2

    def scale(self, level: Level) -> float:
        """Noise^2 / signal."""
        return level.noise**2 / level.signal

    def level(self, time: float) -> Level:
        """The noise level with this (signal / noise)^2."""
        return super().level(math.sqrt(time))


@dataclass(frozen=True)
class NoisyStages(Stages):
    """The stages of a step that adds noise.

    Attributes:
        draw: The number of the step's noise.
        per_noise: What the noise is multiplied by in every stage's slope.
    """

    draw: int = 0
    per_noise: float = 0.0


def rex_sde_program(schedule: Schedule, scheme: str = "midpoint", zeta: float = 0.999) -> Program:
    """The couplings of Rex for the reverse SDE from noise to picture.

    With `u = signal / noise^2 x` and `q = (signal / noise)^2` the SDE is `du = picture(x) dq + dW`. Within a step of
    length h its Brownian motion is taken as the straight line between its ends, `z sqrt(h)` with the step's noise z,
    so the step is one of `du/dq = picture(x) + z / sqrt(h)` by the couplings of `rex_program`. Both couplings have the
    same z, the second one in the other direction. That is strongly convergent, of order 1 as the noise is additive.

    Args:
        schedule: The noise levels, of any prediction type.
        scheme: As in `rex_program`.
        zeta: As in `rex_program`.

    Returns:
        The program, whose tags are `NoisyStages`. A last step to a picture without noise adds none and is that of
        `rex_program`.

    Raises:
        ValueError: An option is out of range, or the schedule starts from pure noise, which an SDE's step forgets.
    """
    zeta = check_options(scheme, zeta)
    program: list[Coupling] = []
    inside, to_picture, draw = SnrClock(schedule), NoiseClock(schedule), 0
    for step, (start, end) in enumerate(itertools.pairwise(levels(schedule))):
        if start == end:
            continue
        if start.signal == 0:
            raise ValueError(
                "schedule: expected a signal at every noise level, got pure noise at the first one: a step of the SDE "
                "from there forgets its start, so it cannot be undone; use Rex, or leave that level out"
            )
        if end.noise == 0:
            program += step_couplings(to_picture, step, start, end, scheme, zeta)
            continue
        per_noise = 1 / math.sqrt(inside.time(end) - inside.time(start))
        for coupling in step_couplings(inside, step, start, end, scheme, zeta):
            stages = NoisyStages(coupling.tag.stages, draw, per_noise)
            program.append(replace(coupling, tag=stages))
        draw += 1
    return tuple(program)


class NoisySlope(RungeKuttaSlope):
    """The mean slope of a Runge-Kutta step, with the step's noise in it. The noise is part of its `tensors()`.

    Args:
        network: The network with its conditions.
        noise: What is taken where a call is given none.
    """

    noise: tuple[Tensor, ...] | None = None

    def with_network(self, network: Evaluator) -> NoisySlope:
        """The same function of another network, with the same noise."""
        other = NoisySlope(network)
        other.noise = self.noise
        return other

    def __call__(
        self,
        x: Tensor,
        t: Stages,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """The mean slope at x. Arguments are as in `RungeKuttaSlope`; `tensors` begins with the noise of all steps."""
        given = self.tensors() if tensors is None else tensors
        first = len(given) - len(self.network.tensors())
        if isinstance(t, NoisyStages):
            added = t.per_noise * given[t.draw].to(x)
        return super().__call__(x, t, given[first:], latents_dtype, added)

    def tensors(self) -> tuple[Tensor, ...]:
        """The noise of all steps, and the conditions of the network."""
        given = _GIVEN.get()
        noise = self.noise if given is None else given
        if noise is None:
            raise ValueError(
                "noise: this chain's steps add noise, and there is none; call it with noise=chain.draw_noise(x), or "
                "set chain.step_noise"
            )
        return (*noise, *self.network.tensors())


class RexSDE(Rex):
    """Rex for the SDE (arXiv 2502.08834): an exactly invertible sampler that adds noise, which is an input.

    `chain(x, noise=[...])` takes one tensor of standard normal noise for each step that adds some (`num_draws` of them,
    which `draw_noise` draws), with a gradient for each of them. `chain.inverse(x, w, noise=[...])` with the same noise
    undoes it. Chains that are called without noise, by `optimize` for instance, and states of exact arithmetic use
    `step_noise`. The arguments are those of `Rex`.

    Raises:
        TypeError: `denoiser` is no `Denoiser`, or `schedule` no `Schedule`.
        ValueError: An option is out of range, or the schedule starts from pure noise.

    Example:
        >>> chain = RexSDE.from_pipeline(pipe, "a dog", num_inference_steps=20, scheme="euler")
        >>> x = chain.noise(seed=0)
        >>> noise = chain.draw_noise(x, seed=1)
        >>> x0, w0 = chain(x, noise=noise)
        >>> xT, wT = chain.inverse(x0, w0, noise=noise)
    """

    make_evaluator = NoisySlope

    @classmethod
    def make_program(cls, schedule: Schedule, scheme: str, zeta: float) -> Program:
        """The couplings, see `rex_sde_program`."""
        return rex_sde_program(schedule, scheme, zeta)

    @property
    def num_draws(self) -> int:
        """How many tensors of noise the steps add."""
        return len({coupling.tag.draw for coupling in self.program if isinstance(coupling.tag, NoisyStages)})

    @property
    def step_noise(self) -> Sequence[Tensor] | None:
        """The noise of calls that are given none.

        Raises:
            ValueError: It is set to more or fewer tensors than `num_draws`.
        """
        return cast(NoisySlope, self.evaluator).noise

    @step_noise.setter
    def step_noise(self, noise: Sequence[Tensor] | None) -> None:
        cast(NoisySlope, self.evaluator).noise = None if noise is None else self._checked(noise)

    def draw_noise(self, x: Tensor, seed: int = 0, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draws the noise that the steps add, in the order of the steps, see `Sampler.draw_noise`."""
        return draw_noise(self.num_draws, x, seed, generator)

    def __call__(
        self, x: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples.

        Args:
            x: Starting latents (B, C, ...).
            y: The second latent of the pair. None is x.
            noise: `num_draws` tensors like x. Each gets a gradient if it requires grad. None is `step_noise`.

        Returns:
            The picture's latents, and the second latent of the pair.

        Raises:
            ValueError: There is more or less noise than the steps add, or it is not like x.
        """
        with self._given(x, noise):
            return super().__call__(x, y)

    def inverse(
        self, x: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Undoes `__call__` with the same noise."""
        with self._given(x, noise):
            return super().inverse(x, y)

    @contextmanager
    def _given(self, x: Tensor, noise: Sequence[Tensor] | None) -> Iterator[None]:
        """Gives the noise of one call to the evaluator, in this thread alone."""
        noise = self.step_noise if noise is None else noise
        if noise is not None:
            check_all({"x": x, **{f"noise[{number}]": z for number, z in enumerate(self._checked(noise))}})
        token = _GIVEN.set(None if noise is None else tuple(noise))
        try:
            yield
        finally:
            _GIVEN.reset(token)

    def _checked(self, noise: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(noise) != self.num_draws:
            raise ValueError(
                f"noise: expected {self.num_draws} tensors, one for each step that adds noise, got {len(noise)}; use "
                "noise=chain.draw_noise(x)"
            )
        return tuple(noise)
