"""A noise schedule as plain numbers: what a solver needs to know of a diffusers scheduler."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """The steps of a deterministic sampler from noise to image, in denoising order (timesteps fall).

    timesteps: n ints, what the network is given.
    alphas_cumprod: n floats in (0, 1), the cumulative alpha at each timestep.
    alphas_cumprod_prev: n floats in (0, 1], the one each step leads to.
    prediction_type: "epsilon", "v_prediction" or "sample".

    Raises ValueError when the lengths differ, there is no step, a number is out of range or the prediction type is
    unknown.
    """

    timesteps: tuple[int, ...]
    alphas_cumprod: tuple[float, ...]
    alphas_cumprod_prev: tuple[float, ...]
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        lengths = (len(self.timesteps), len(self.alphas_cumprod), len(self.alphas_cumprod_prev))
        if len(set(lengths)) != 1 or lengths[0] == 0:
            raise ValueError(
                "timesteps, alphas_cumprod, alphas_cumprod_prev: expected one length of at least 1, "
                f"got {', '.join(map(str, lengths))}"
            )
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type: expected one of {PREDICTION_TYPES}, got {self.prediction_type!r}")
        if any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in self.timesteps):
            raise ValueError(f"timesteps: expected ints of at least 0, got {self.timesteps}")
        for t, alpha, alpha_prev in zip(self.timesteps, self.alphas_cumprod, self.alphas_cumprod_prev, strict=True):
            if alpha == 0:
                raise ValueError(
                    f"alphas_cumprod is 0 at timestep {t} (zero terminal signal-to-noise): that step cannot be undone. "
                    "Use rescale_betas_zero_snr=False, or timestep_spacing='leading', which leaves that timestep out"
                )
            if not (0 < alpha < 1 and 0 < alpha_prev <= 1):
                raise ValueError(f"cumulative alphas at timestep {t} must lie in (0, 1), got {alpha} and {alpha_prev}")

    def __len__(self) -> int:
        return len(self.timesteps)

    def __repr__(self) -> str:
        ends = f"timesteps {self.timesteps[0]} to {self.timesteps[-1]}"
        return f"Schedule({len(self)} steps, {ends}, {self.prediction_type})"

    @classmethod
    def from_scheduler(cls, scheduler: Any, num_inference_steps: int) -> Schedule:
        """The DDIM schedule (arXiv 2010.02502) over the noise levels of any discrete diffusers scheduler.

        scheduler: a diffusers scheduler with `alphas_cumprod` (DDIM, PNDM, Euler, DPM-Solver, ...; what it adds to DDIM
        is not used), or any object with `alphas_cumprod`, `set_timesteps(n)` and `timesteps`. It is never changed.
        num_inference_steps: int from 1 to the scheduler's number of training timesteps.

        Alphas are read at full precision. Each step leads exactly to the next one's noise level, the last one to the
        scheduler's `final_alpha_cumprod`. For "leading" spacing that is what diffusers' own DDIM does; for the other
        spacings diffusers steps by a constant stride, which misses the next timestep by rounding. `clip_sample` and
        `thresholding` are
        not applied: they cannot be undone.

        Raises TypeError for an object that is not a scheduler, ValueError for a schedule that cannot be used.
        """
        alphas = noise_levels(scheduler)
        steps = _num_steps(num_inference_steps, int(setting(scheduler, "num_train_timesteps", len(alphas))))
        timesteps = _timesteps(scheduler, steps, len(alphas))
        for t in timesteps:
            if not 0 <= t < len(alphas):
                raise ValueError(f"timestep {t} is not one of the scheduler's {len(alphas)}; use fewer inference steps")
        at_steps = tuple(alphas[t] for t in timesteps)
        return cls(
            timesteps=timesteps,
            alphas_cumprod=at_steps,
            alphas_cumprod_prev=(*at_steps[1:], _final_alpha(scheduler, alphas)),
            prediction_type=str(setting(scheduler, "prediction_type", "epsilon")),
        )


def noise_levels(scheduler: Any) -> list[float]:
    """All cumulative alphas of a scheduler, in float64. Raises TypeError for what has none."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        name = type(scheduler).__name__
        if hasattr(scheduler, "set_timesteps"):
            raise TypeError(
                f"scheduler: {name} has no alphas_cumprod; flow-matching and continuous-sigma schedulers are not "
                "supported. Use a model with a discrete noise schedule (DDIM, PNDM, Euler, DPM-Solver, ...)"
            )
        raise TypeError(f"scheduler: expected a diffusers scheduler (pipe.scheduler, for instance), got {name}")
    values: list[float] = torch.as_tensor(alphas).detach().to("cpu", torch.float64).reshape(-1).tolist()
    return values


def setting(scheduler: Any, key: str, default: Any) -> Any:
    """A setting of the scheduler, whose `config` may be a dict, a diffusers FrozenDict or a plain object."""
    config = getattr(scheduler, "config", None)
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return default if value is None else value


def _num_steps(value: Any, limit: int) -> int:
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
    """Timesteps in denoising order, taken from a copy so that the caller's scheduler keeps its own."""
    raw: list[float]
    if any(base.__module__.startswith("diffusers.") for base in type(scheduler).__mro__):
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
    """Where the last step leads: the scheduler's own answer if it has one, else DDIM's rule on its config."""
    final = getattr(scheduler, "final_alpha_cumprod", None)
    if final is not None:
        return float(final)
    return 1.0 if setting(scheduler, "set_alpha_to_one", True) else alphas[0]
