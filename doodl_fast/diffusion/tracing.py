"""Reads the steps of any linear diffusers scheduler off the scheduler itself, as plain numbers.

A scheduler's `step` is, for almost every scheduler, a linear function of the latents, of the network's outputs so far
and of the noise that it draws. So it is called once with unit vectors in their place, and what comes out are the
coefficients: no formula of any sampler is repeated here.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .edm import is_edm
from .scheduler_check import setting
from .span import Span

Kind = Literal["latents", "output", "noise"]
KINDS: tuple[Kind, ...] = ("latents", "output", "noise")
LEARNED = ("learned", "learned_range")
LARGEST_ERROR = 1e-4
"""Some schedulers compute in float32 and divide by small numbers."""
DUST = 2e-6
"""A coefficient this small beside the step's largest one is what float32 has left of zero."""


class Term(NamedTuple):
    """One quantity that a step may depend on.

    Attributes:
        kind: "latents" at the start of a step, the network's "output" in it, or the "noise" that it draws.
        number: Of the step, or of the noise in the order of drawing.
    """

    kind: Kind
    number: int


@dataclass(frozen=True)
class LinearStep:
    """One step of a scheduler.

    Attributes:
        timestep: What the network is given, an int or a float as the scheduler has it.
        input_scale: The network is evaluated at `input_scale * latents`.
        result: The next latents, as coefficients of the terms that they are made of.
    """

    timestep: int | float
    input_scale: float
    result: Mapping[Term, float]


@dataclass(frozen=True)
class SamplerSteps:
    """Everything that a scheduler does to latents, as numbers.

    Attributes:
        name: The scheduler's class.
        steps: One entry for each network call. Schedulers of higher order make several calls for one step.
        initial_scale: What the chain's start is multiplied by before the first step: for standard normal noise the
            scheduler's `init_noise_sigma`.
        start: The shares of picture and noise in the start, before it is multiplied.
    """

    name: str
    steps: tuple[LinearStep, ...]
    initial_scale: float
    start: tuple[float, float] = (0.0, 1.0)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"SamplerSteps({self.name}, {len(self)} network calls, {self.num_draws} draws of noise)"

    @property
    def timesteps(self) -> tuple[int | float, ...]:
        """What the network is given in each of its calls."""
        return tuple(step.timestep for step in self.steps)

    @property
    def num_draws(self) -> int:
        """How often the scheduler adds noise."""
        return len({term for step in self.steps for term in step.result if term.kind == "noise"})

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int,
        step_options: Mapping[str, Any] | None = None,
        span: Span | None = None,
        **set_timesteps: Any,
    ) -> SamplerSteps:
        """Reads the steps of a diffusers scheduler off the scheduler itself.

        Args:
            scheduler: A diffusers scheduler. It is copied and never changed.
            num_inference_steps: As in `scheduler.set_timesteps`.
            step_options: More arguments of `scheduler.step`, `{"eta": 1.0}` for `DDIMScheduler` for instance.
            span: Which of the steps are made; None is all of them.
            **set_timesteps: More arguments of `scheduler.set_timesteps`, `mu` of a flow scheduler for instance.

        Raises:
            TypeError: It has no `set_timesteps` and `step`.
            ValueError: A step is not linear, because the predicted picture is clipped or thresholded for instance, or
                the scheduler needs more than the network's output, or its noise cannot be followed.
        """
        name = type(scheduler).__name__
        if not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "step"):
            raise TypeError(f"scheduler: expected a diffusers scheduler (pipe.scheduler, for instance), got {name}")
        if setting(scheduler, "variance_type", "") in LEARNED:
            raise ValueError(
                f"scheduler: {name} has variance_type={setting(scheduler, 'variance_type', '')!r}, so the deviation of "
                "its noise comes from the network, and its steps are not linear in the network's output; use "
                "variance_type='fixed_small', or a solver of doodl_fast such as DDIM"
            )
        fresh = copy.deepcopy(scheduler)
        fresh.set_timesteps(num_inference_steps, **set_timesteps)
        part = span.steps([_number(t) for t in fresh.timesteps], getattr(fresh, "order", 1)) if span else None
        timesteps = list(fresh.timesteps) if part is None else list(fresh.timesteps)[part.start : part.stop]
        if part and hasattr(fresh, "set_begin_index"):
            fresh.set_begin_index(part.start)
        scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
        scale, start = _start(copy.deepcopy(fresh), timesteps[0], scale, span)
        try:
            steps = _shortened(_trace(copy.deepcopy(fresh), timesteps, step_options or {}))
            error = _distance_from_scheduler(fresh, timesteps, steps, step_options or {})
        except Exception as problem:  # A scheduler may fail in any way when it is given unit vectors.
            raise ValueError(
                f"scheduler: the steps of {name} cannot be read off ({type(problem).__name__}: {problem}); use "
                "another scheduler, or a solver of doodl_fast such as DDIM"
            ) from problem
        if not error < LARGEST_ERROR:
            raise ValueError(
                f"scheduler: the steps of {name} are not linear in the network's output (off by {error:.2g}), so their "
                "coefficients cannot be read off; switch off clip_sample and thresholding, or use another scheduler"
            )
        return cls(name, tuple(steps), scale, start)


def _start(
    scheduler: Any, timestep: Any, init_noise_sigma: float, span: Span | None
) -> tuple[float, tuple[float, float]]:
    """Returns by what a chain's start is multiplied, and its shares of picture and noise.

    A chain's latents have unit variance where they start, except for the start of a flow; what the scheduler multiplies
    them by, because its own have another, is left to the program.

    Args:
        scheduler: With its timesteps.
        timestep: The first one.
        init_noise_sigma: What the scheduler multiplies noise by.
        span: Which steps are made.
    """
    if span is None or not span.from_picture:
        return 1.0 if span is not None and span.below is not None else init_noise_sigma, (0.0, 1.0)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    at = timestep.reshape(1)
    # Schedulers of flows name this otherwise, and take its arguments in another order.
    add = getattr(scheduler, "add_noise", None) or (lambda a, b, t: scheduler.scale_noise(a, t, b))
    shares = [float(add(a, b, at)) for a, b in ((one, zero), (zero, one))]
    scale = 1.0 if init_noise_sigma == 1 else math.hypot(*shares)
    return scale, (shares[0] / scale, shares[1] / scale)


def _trace(scheduler: Any, timesteps: Sequence[Any], options: Mapping[str, Any]) -> list[LinearStep]:
    """Calls the `step` of a scheduler that has its timesteps with unit vectors."""
    basis = _Basis(len(timesteps))
    steps: list[LinearStep] = []
    with torch.no_grad(), _NoiseDrawnBy(basis.noise):
        _replace_sampler(scheduler, basis.noise)
        for number, timestep in enumerate(timesteps):
            own = Term("latents", number)
            latents, output = basis.vector(own), basis.vector(Term("output", number))
            seen = basis.read(_network_input(scheduler, latents, timestep))
            result = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
            steps.append(LinearStep(_number(timestep), seen[own], basis.read(result)))
    return steps


def _shortened(steps: list[LinearStep]) -> list[LinearStep]:
    """The same steps, without what the latents before a step say already.

    A scheduler that corrects its latents once it has seen the network's next output (UniPC) carries the corrected ones
    on, which nothing but the scheduler sees. Read off, its step depends on the latents and outputs of all steps before.
    But the latents at the start of a step have the same share of the old ones, up to a factor, so they stand for them.
    """
    shorter = steps[:1]
    for number, (before, step) in enumerate(itertools.pairwise(steps), 1):
        old = [term for term in before.result if term in step.result and term.number < number - 4]
        result = dict(step.result)
        if old:
            known = max(old, key=lambda term: abs(before.result[term]))
            factor = step.result[known] / before.result[known]
            for term, share in before.result.items():
                result[term] = result.get(term, 0.0) - factor * share
            own = Term("latents", number)
            result[own] = result.get(own, 0.0) + factor
            dust = DUST * max(map(abs, (*step.result.values(), *(factor * share for share in before.result.values()))))
            result = {term: share for term, share in result.items() if abs(share) > dust}
        shorter.append(replace(step, result=result) if len(result) < len(step.result) else step)
    return shorter


def _distance_from_scheduler(
    scheduler: Any, timesteps: Sequence[Any], steps: Sequence[LinearStep], options: Mapping[str, Any]
) -> float:
    """How far the steps are from the scheduler's own on random latents and outputs, relative to these."""
    generator = torch.Generator().manual_seed(0)
    values: dict[Term, Tensor] = {}

    def draw() -> Tensor:
        # Wide enough that a scheduler that clips at 1 does clip.
        return torch.empty(1, 4, 2, 2, dtype=torch.float64).normal_(std=3, generator=generator)

    def noise(dtype: torch.dtype | None) -> Tensor:
        drawn = draw().to(dtype)
        values[Term("noise", sum(term.kind == "noise" for term in values))] = drawn.double()
        return drawn

    worst, latents = 0.0, draw() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    with torch.no_grad(), _NoiseDrawnBy(noise):
        _replace_sampler(scheduler, noise)
        for number, (timestep, step) in enumerate(zip(timesteps, steps, strict=True)):
            output = values[Term("output", number)] = draw()
            values[Term("latents", number)] = latents
            _network_input(scheduler, latents, timestep)
            result = scheduler.step(output, timestep, latents, return_dict=False, **options)[0].double()
            expected = torch.stack([share * values[term] for term, share in step.result.items()])
            scale = float(expected.abs().sum(0).max())
            worst = max(worst, float((result - expected.sum(0)).abs().max()) / scale if scale else 0.0)
            latents = result
    return worst


def _network_input(scheduler: Any, latents: Tensor, timestep: Any) -> Tensor:
    """What the network is given: the latents, in schedulers that scale them, scaled."""
    scale = getattr(scheduler, "scale_model_input", None)
    scaled: Tensor = latents if scale is None else scale(latents, timestep)
    return scaled


class _Basis:
    """Unit vectors that stand for the terms, as latents of shape (1, terms, 1, 1)."""

    def __init__(self, steps: int) -> None:
        # A scheduler draws noise at most twice in a step.
        self._terms = [Term(kind, number) for kind in KINDS for number in range(2 * steps)]
        self._positions = {term: position for position, term in enumerate(self._terms)}
        self._drawn = 0

    def vector(self, term: Term, dtype: torch.dtype = torch.float64) -> Tensor:
        """The unit vector of a term."""
        vector = torch.zeros(1, len(self._terms), 1, 1, dtype=dtype)
        vector[0, self._positions[term]] = 1
        return vector

    def noise(self, dtype: torch.dtype | None) -> Tensor:
        """The unit vector of the next draw of noise."""
        self._drawn += 1
        return self.vector(Term("noise", self._drawn - 1), dtype or torch.float32)

    def read(self, value: Tensor) -> dict[Term, float]:
        """The coefficients of a linear combination of the vectors, without those that are zero."""
        if value.numel() != len(self._terms):
            raise ValueError(f"its latents have the shape {tuple(value.shape)} instead of the input's")
        coefficients = value.flatten().double().tolist()
        return {term: share for term, share in zip(self._terms, coefficients, strict=True) if share}


def _replace_sampler(scheduler: Any, noise: Callable[[torch.dtype | None], Tensor]) -> None:
    """Gives Stable Audio's scheduler, which draws its noise from a Brownian motion, another source of it.

    The increments of a Brownian motion over steps that do not overlap, divided by their deviation, are independent
    standard normal draws, so this is noise like any other scheduler's. Other schedulers are left as they are.
    """
    if is_edm(scheduler):
        scheduler.noise_sampler = lambda sigma, sigma_next: noise(torch.float32)


class _NoiseDrawnBy(TorchFunctionMode):
    """Inside it, and in this thread alone, torch draws normal noise from a function of the dtype."""

    def __init__(self, noise: Callable[[torch.dtype | None], Tensor]) -> None:
        super().__init__()
        self._noise = noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.randn_like):
            return self._noise((kwargs or {}).get("dtype"))
        return func(*args, **(kwargs or {}))


def _number(timestep: Any) -> int | float:
    """A timestep as an int where it is whole."""
    value = timestep.item() if isinstance(timestep, Tensor) else timestep
    return int(value) if float(value).is_integer() else float(value)
