"""A noise schedule as plain numbers: what a solver needs to know of a diffusers scheduler."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .edm import edm_steps, is_edm
from .flow import flow_steps, is_flow
from .scheduler_check import (
    OWN_TIMESTEPS,
    is_from_diffusers,
    is_kind,
    left_out,
    refuse_what_would_be_wrong,
    setting,
)
from .span import Span

__all__ = ["PREDICTION_TYPES", "Schedule", "noise_levels", "setting"]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FLOW = "flow"
"""The prediction type of a flow's network: noise minus picture."""
ZERO_IN_DIFFUSERS = 2.0**-24
"""What some schedulers put in the place of a cumulative alpha of 0, by which their updates would divide."""


@dataclass(frozen=True)
class Origin:
    """The scheduler that a schedule was read off, and how: what `Sampler` needs to take the scheduler's own steps.

    Attributes:
        scheduler: A copy of the scheduler.
        num_inference_steps: As in `Schedule.from_scheduler`.
        options: The other arguments of the scheduler's `set_timesteps`.
    """

    scheduler: Any
    num_inference_steps: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """The steps of a deterministic sampler from noise to image, in denoising order (timesteps fall).

    A schedule is either that of a diffusion, with cumulative alphas, or that of a flow (rectified flow, flow matching,
    arXiv 2209.03003), with sigmas. `Schedule.flow` makes the latter by hand.

    Args:
        timesteps: n numbers of at least 0, which the network is given. `from_scheduler` gives ints; a table that is
            made by hand may hold fractions.
        alphas_cumprod: n floats, the cumulative alpha at each timestep: in (0, 1), or 0 at the first one (zero terminal
            signal-to-noise, arXiv 2305.08891) for a network that predicts v or the sample.
        alphas_cumprod_prev: n floats in (0, 1], the cumulative alpha that each step leads to.
        prediction_type: What the network returns: "epsilon", "v_prediction" or "sample"; "flow", which is noise minus
            picture, if there are sigmas.
        sigmas: Empty for a diffusion. For a flow n + 1 falling floats from 1 or less to 0 or more, and no alphas: the
            latent at a level is `(1 - sigma) * picture + sigma * noise`.
        training_alphas: The cumulative alphas of all timesteps in training, if they are known. Solvers that evaluate
            the network between the schedule's levels interpolate timesteps in them. Schedules are compared without.
        origin: The scheduler that `from_scheduler` read, for `Sampler`. Schedules are compared without it too.

    Raises:
        ValueError: The lengths differ, there is no step, a number is out of range, or the prediction type is unknown.
    """

    timesteps: tuple[int | float, ...]
    alphas_cumprod: tuple[float, ...] = ()
    alphas_cumprod_prev: tuple[float, ...] = ()
    prediction_type: str = "epsilon"
    sigmas: tuple[float, ...] = ()
    training_alphas: tuple[float, ...] = field(default=(), compare=False, repr=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if any(isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 <= t < math.inf for t in self.timesteps):
            raise ValueError(f"timesteps: expected floats or ints of at least 0, got {self.timesteps}")
        if self.sigmas:
            self._check_flow()
        else:
            self._check_diffusion()

    def _check_flow(self) -> None:
        """Raises ValueError for what is no flow."""
        if self.alphas_cumprod or self.alphas_cumprod_prev:
            raise ValueError("alphas_cumprod: expected none because sigmas are given; a flow has no cumulative alphas")
        if self.prediction_type != FLOW:
            raise ValueError(f"prediction_type: expected 'flow' with sigmas, got {self.prediction_type!r}")
        if len(self.sigmas) != len(self.timesteps) + 1 or not self.timesteps:
            raise ValueError(
                f"sigmas: expected {len(self.timesteps) + 1}, one more than there are timesteps, got {len(self.sigmas)}"
            )
        falling = all(now > after for now, after in zip(self.sigmas, self.sigmas[1:], strict=False))
        if not (falling and self.sigmas[0] <= 1 and self.sigmas[-1] >= 0):
            raise ValueError(f"sigmas: expected numbers that fall from 1 or less to 0 or more, got {self.sigmas}")

    def _check_diffusion(self) -> None:
        """Raises ValueError for what is no schedule of a diffusion."""
        lengths = (len(self.timesteps), len(self.alphas_cumprod), len(self.alphas_cumprod_prev))
        if len(set(lengths)) != 1 or lengths[0] == 0:
            raise ValueError(
                "timesteps, alphas_cumprod, alphas_cumprod_prev: expected one length of at least 1, "
                f"got {', '.join(map(str, lengths))}"
            )
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type: expected one of {PREDICTION_TYPES}, got {self.prediction_type!r}")
        for t, alpha, alpha_prev in zip(self.timesteps, self.alphas_cumprod, self.alphas_cumprod_prev, strict=True):
            is_blind = alpha == 0 and t == self.timesteps[0]
            if is_blind and self.prediction_type == "epsilon":
                raise ValueError(
                    f"alphas_cumprod is 0 at timestep {t} (zero terminal signal-to-noise): a network that predicts "
                    "epsilon says nothing of the picture there. Use a network that predicts v or the sample, "
                    "rescale_betas_zero_snr=False, or timestep_spacing='leading', which leaves that timestep out"
                )
            if not ((is_blind or 0 < alpha < 1) and 0 < alpha_prev <= 1):
                raise ValueError(f"cumulative alphas at timestep {t} must lie in (0, 1), got {alpha} and {alpha_prev}")

    def __len__(self) -> int:
        return len(self.timesteps)

    def __repr__(self) -> str:
        ends = f"timesteps {self.timesteps[0]} to {self.timesteps[-1]}"
        return f"Schedule({len(self)} steps, {ends}, {self.prediction_type})"

    @property
    def is_flow(self) -> bool:
        """Whether this is the schedule of a flow, which has `sigmas` and no cumulative alphas."""
        return bool(self.sigmas)

    @property
    def start(self) -> tuple[float, float]:
        """The shares of picture and noise in the latents that a chain starts from."""
        if self.is_flow:
            return 1 - self.sigmas[0], self.sigmas[0]
        return math.sqrt(self.alphas_cumprod[0]), math.sqrt(1 - self.alphas_cumprod[0])

    def part(self, steps: range) -> Schedule:
        """Returns the schedule of some of the steps, which follow one another."""
        first, last = steps.start, steps.stop
        return replace(
            self,
            timesteps=self.timesteps[first:last],
            alphas_cumprod=self.alphas_cumprod[first:last],
            alphas_cumprod_prev=self.alphas_cumprod_prev[first:last],
            sigmas=self.sigmas[first : last + 1] if self.sigmas else (),
        )

    @classmethod
    def flow(cls, timesteps: Sequence[int | float], sigmas: Sequence[float]) -> Schedule:
        """Makes the schedule of a flow by hand.

        Args:
            timesteps: n numbers of at least 0, which the network is given.
            sigmas: n + 1 falling numbers from 1 or less to 0 or more.

        Raises:
            ValueError: The lengths do not fit, or the sigmas do not fall.
        """
        return cls(tuple(timesteps), prediction_type=FLOW, sigmas=tuple(sigmas))

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int,
        *,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
        span: Span | None = None,
    ) -> Schedule:
        """Reads the noise levels of a diffusers scheduler, between which the chain steps as DDIM does.

        DDIM: Song et al., arXiv 2010.02502. Alphas are read at full precision. Each step leads exactly to the next
        one's noise level, and the last one to the scheduler's `final_alpha_cumprod`. LCM and TCD keep their own
        timesteps; all other schedulers get those of DDIM with their `timestep_spacing`.

        Flow-matching schedulers give their own sigmas and (fractional) timesteps, and DDIM's step is Euler's there.

        Args:
            scheduler: A diffusers scheduler with `alphas_cumprod` (DDIM, PNDM, Euler, DPM-Solver, LCM, ...), or any
                object with `alphas_cumprod`, `set_timesteps(n)` and `timesteps`; or diffusers'
                FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler or FlowMatchLCMScheduler. It is never
                changed.
            num_inference_steps: From 1 to the scheduler's number of training timesteps.
            mu: For flow-matching schedulers with use_dynamic_shifting, as in their `set_timesteps`.
            sigmas: For flow-matching schedulers, the sigmas before shifting, as in their `set_timesteps`.
            span: Which of the steps are made; None is all of them.

        Returns:
            The schedule.

        Raises:
            TypeError: `scheduler` is no scheduler with discrete noise levels.
            ValueError: The schedule cannot be used, or the scheduler does what would make the pictures wrong: it clips
                or thresholds its predictions, has continuous timesteps, or runs the other way.

        Warns:
            RuntimeWarning: Names what the scheduler does and the chain leaves out, such as added noise, higher-order
                steps, or its own spacing of timesteps.
        """
        if is_flow(scheduler):
            steps = _num_steps(num_inference_steps, int(setting(scheduler, "num_train_timesteps", 1000)))
            found = flow_steps(scheduler, steps, mu, sigmas)
            _warn_of(scheduler, found.missing, "DDIM, which is Euler's method on a flow")
            options = (("mu", mu), ("sigmas", sigmas), ("span", span))
            given = {name: value for name, value in options if value is not None}
            flow = cls.flow(found.timesteps, found.sigmas)
            flow = flow if span is None else flow.part(span.steps(flow.timesteps))
            return replace(flow, origin=Origin(copy.deepcopy(scheduler), steps, given))
        for name, value in (("mu", mu), ("sigmas", sigmas)):
            if value is not None:
                raise ValueError(f"{name}: expected None because {type(scheduler).__name__} is no flow, got {value!r}")
        if is_edm(scheduler):
            steps = _num_steps(num_inference_steps, int(setting(scheduler, "num_train_timesteps", 1000)))
            edm = edm_steps(scheduler, steps)
            _warn_of(scheduler, edm.missing, "DDIM")
            scaled = cls(edm.timesteps, edm.alphas[:-1], edm.alphas[1:], "v_prediction")
            scaled = scaled if span is None else scaled.part(span.steps(edm.timesteps))
            origin = Origin(copy.deepcopy(scheduler), steps, {} if span is None else {"span": span})
            return replace(scaled, origin=origin)
        levels = noise_levels(scheduler)
        refuse_what_would_be_wrong(scheduler)
        steps = _num_steps(num_inference_steps, int(setting(scheduler, "num_train_timesteps", len(levels))))
        timesteps = _timesteps(scheduler, steps, len(levels))
        for t in timesteps:
            if not 0 <= t < len(levels):
                raise ValueError(f"timestep {t} is not one of the scheduler's {len(levels)}; use fewer inference steps")
        at_steps = tuple(levels[t] for t in timesteps)
        # TCD's last step leads to timestep 0 (arXiv 2402.19159).
        last = levels[0] if is_kind(scheduler, ["TCDScheduler"]) else _final_alpha(scheduler, levels)
        schedule = cls(
            timesteps=timesteps,
            alphas_cumprod=at_steps,
            alphas_cumprod_prev=(*at_steps[1:], last),
            prediction_type=str(setting(scheduler, "prediction_type", "epsilon")),
            training_alphas=tuple(levels),
            origin=Origin(copy.deepcopy(scheduler), steps, {} if span is None else {"span": span}),
        )
        missing = left_out(scheduler, steps, timesteps, levels, last) if is_from_diffusers(scheduler) else []
        _warn_of(scheduler, missing, "DDIM")
        return schedule if span is None else schedule.part(span.steps(timesteps))


def _warn_of(scheduler: Any, missing: Sequence[str], sampler: str) -> None:
    """Says, at the line of the caller of `from_scheduler`, what the scheduler does and the chain leaves out."""
    if missing:
        warnings.warn(
            f"{type(scheduler).__name__}: not part of the chain: {'; '.join(missing)}. Its noise levels are sampled by "
            f"{sampler}; doodl_fast.Sampler runs a scheduler's own steps",
            RuntimeWarning,
            stacklevel=3,
        )


def noise_levels(scheduler: Any) -> list[float]:
    """Returns all cumulative alphas of a scheduler, in float64.

    Raises:
        TypeError: The scheduler has none.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        name = type(scheduler).__name__
        if hasattr(scheduler, "set_timesteps"):
            raise TypeError(
                f"scheduler: {name} has no alphas_cumprod and is no flow-matching scheduler that is known, so its "
                "noise levels cannot be read. Use a model with a discrete noise schedule (DDIM, PNDM, Euler, "
                "DPM-Solver, ...), FlowMatchEulerDiscreteScheduler, or doodl_fast.Sampler"
            )
        raise TypeError(f"scheduler: expected a diffusers scheduler (pipe.scheduler, for instance), got {name}")
    values: list[float] = torch.as_tensor(alphas).detach().to("cpu", torch.float64).reshape(-1).tolist()
    if setting(scheduler, "rescale_betas_zero_snr", False) and values[-1] == ZERO_IN_DIFFUSERS:
        values[-1] = 0.0
    return values


def _num_steps(value: Any, limit: int) -> int:
    """Returns the number of inference steps as an int. Raises TypeError or ValueError for anything else."""
    try:
        steps = operator.index(value)
    except TypeError:
        raise TypeError(f"num_inference_steps: expected an int, got {value!r}") from None
    if isinstance(value, bool) or not 1 <= steps <= limit:
        raise ValueError(
            f"num_inference_steps: expected an int from 1 to {limit} (the training timesteps), got {value!r}"
        )
    return steps


def _timesteps(scheduler: Any, steps: int, limit: int) -> tuple[int, ...]:
    """Returns the timesteps in denoising order, taken from a copy so that the caller's scheduler keeps its own."""
    raw: list[float]
    if is_from_diffusers(scheduler) and not is_kind(scheduler, OWN_TIMESTEPS):
        from diffusers import DDIMScheduler

        # Only what places the timesteps: DDIMScheduler need not know a foreign scheduler's beta schedule.
        make: Any = DDIMScheduler  # its constructor has no type hints
        ddim = make(
            num_train_timesteps=int(setting(scheduler, "num_train_timesteps", limit)),
            timestep_spacing=setting(scheduler, "timestep_spacing", "leading"),
            steps_offset=int(setting(scheduler, "steps_offset", 0)),
        )
        ddim.set_timesteps(steps)
        # Rounding gives "trailing" spacing a last timestep of -1 too many at 62 of the 1000 possible lengths.
        raw = [float(t) for t in ddim.timesteps][:steps]
    elif hasattr(scheduler, "set_timesteps"):
        stepper = copy.deepcopy(scheduler)
        stepper.set_timesteps(steps)
        raw = [float(t) for t in stepper.timesteps]
    else:
        raise TypeError(f"scheduler: {type(scheduler).__name__} has no set_timesteps method")
    timesteps = tuple(int(t) for t in raw)
    if any(t != whole for t, whole in zip(raw, timesteps, strict=True)):
        raise ValueError("timesteps: expected whole numbers; fractional timesteps have no recorded noise level")
    return timesteps


def _final_alpha(scheduler: Any, alphas: Sequence[float]) -> float:
    """Returns the cumulative alpha of the picture: the scheduler's own if it has one, else by DDIM's rule."""
    final = getattr(scheduler, "final_alpha_cumprod", None)
    if final is not None:
        return float(final)
    return 1.0 if setting(scheduler, "set_alpha_to_one", True) else alphas[0]
