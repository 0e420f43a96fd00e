"""Rex: exactly invertible Runge-Kutta solvers of any order (arXiv 2502.08834), by McCallum and Foster's coupling."""

from __future__ import annotations

import itertools
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..chain.exact.state import LatticeState
from ..chain.latents import check_latents
from ..chain.memory.strategies import Memory
from ..chain.program import Coupling, Program
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import Schedule
from .base import DiffusionChain
from .clock import Clock, NoiseClock, PictureClock
from .coefficients import Level, levels
from .runge_kutta import SCHEMES, RungeKuttaSlope, Stages, make_stages
from .single import check_real
from .step_back import step_back


def rex_program(schedule: Schedule, scheme: str = "midpoint", zeta: float = 0.999) -> Program:
    """The couplings of Rex from noise to picture.

    With `y = x / noise` and `g = signal / noise` let `Psi_h(y)` be what an explicit Runge-Kutta scheme adds to y in a
    step of length h of `dy/dg = picture(x)`, the network's prediction of the picture. A pair y, w takes the step

        y' = zeta y + (1 - zeta) w + Psi_h(w)
        w' = w - Psi_{-h}(y')

    where Psi_h starts from the level before the step and Psi_{-h} from the level after it (McCallum and Foster, arXiv
    2410.11648). Both are couplings, and the pair has the order of the scheme. In these variables the solution grows,
    and the difference of y and w shrinks, because its steps are those of the reversed equation.

    Args:
        schedule: The noise levels, of any prediction type.
        scheme: "euler", "midpoint", "heun" or "rk4", of orders 1, 2, 2 and 4.
        zeta: In (0, 1]. 1 is an uncoupled leapfrog, the least stable; undoing a step divides by it.

    Returns:
        The program, whose picture is value 0, and whose tags are `Stages`. A step between equal noise levels is left
        out. A last step to a picture without noise, where g is infinite, is one of `dz/ds = eps` with `z = x / signal`
        and `s = noise / signal` (of a flow, of `dx/dsigma = v`). A network is never evaluated where there is no noise:
        that step leaves w behind, and a scheme that would evaluate the network at its end is replaced by "midpoint".

    Raises:
        ValueError: An option is out of range, or a single step leads from pure noise to a picture without noise.
    """
    zeta = check_options(scheme, zeta)
    program: list[Coupling] = []
    inside, to_picture = PictureClock(schedule), NoiseClock(schedule)
    for step, (start, end) in enumerate(itertools.pairwise(levels(schedule))):
        if start == end:
            continue
        if end.noise == 0 and start.signal == 0 and not schedule.is_flow:
            raise ValueError(
                "schedule: expected a noise level between pure noise and the picture, got a single step; use 2 steps"
            )
        program += step_couplings(inside if end.noise else to_picture, step, start, end, scheme, zeta)
    return tuple(program)


def check_options(scheme: str, zeta: object) -> float:
    """Returns zeta as a float, or raises ValueError for an option that is out of range."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")
    return check_real("zeta", zeta, 0, 1, "0.999 is the paper's choice")


def step_couplings(clock: Clock, step: int, start: Level, end: Level, scheme: str, zeta: float) -> list[Coupling]:
    """The couplings of one step of `rex_program` in a clock's variable, from one noise level to another."""
    tableau = SCHEMES["midpoint" if end.noise == 0 and 1.0 in SCHEMES[scheme].nodes else scheme]
    a, b = clock.scale(end) / clock.scale(start), clock.scale(end) * (clock.time(end) - clock.time(start))
    couplings = [Coupling(0, zeta * a, (1 - zeta) * a, b, step, make_stages(clock, start, end, tableau))]
    if end.noise:
        couplings.append(Coupling(1, a, 0.0, b, step, make_stages(clock, end, start, tableau)))
    return couplings


class Rex(DiffusionChain):
    """Rex (arXiv 2502.08834): an exactly invertible sampler of first, second or fourth order.

    A step of "euler" calls the network twice, of "midpoint" and "heun" 4 times, of "rk4" 8 times. Latents are (B, C,
    ...) of fp16, bf16, fp32 or fp64; results and gradients have their dtype. Gradients are also given to the denoiser's
    conditions that require grad, never to weights.

    Args:
        denoiser: The network with its conditions. It is given fractional timesteps between those of the schedule.
        schedule: The noise levels. Its prediction type tells what the network returns.
        scheme: "euler", "midpoint", "heun" or "rk4".
        zeta: How much of itself the first latent keeps in a step, in (0, 1]. With arithmetic="exact" or "exact64" the
            coefficients are rounded as those of other solvers are.
        memory: What is kept for the gradient, see `Chain`. One evaluation of a program is a whole Runge-Kutta step, so
            a kept graph is that of all its calls.
        state_dtype: In which the latents and their cotangents are carried, see `Chain`.
        arithmetic: "float", "exact" or "exact64", see `Chain`.
        drift_tolerance: How far undone couplings may miss the start, see `Chain`.
        memory_budget: For memory="auto", see `Chain`.

    Raises:
        TypeError: `denoiser` is no `Denoiser`, or `schedule` no `Schedule`.
        ValueError: An option is out of range; the error names it.

    Example:
        >>> chain = Rex.from_pipeline(pipe, "a dog", num_inference_steps=20, scheme="midpoint")
        >>> x0, w0 = chain(chain.noise(seed=0))  # x0 is the picture's latents
        >>> xT, wT = chain.inverse(x0, w0)  # and back
    """

    num_starts = 1
    num_pictures = 1
    make_evaluator: ClassVar[type[RungeKuttaSlope]] = RungeKuttaSlope

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        scheme: str = "midpoint",
        zeta: float = 0.999,
        memory: Memory = "checkpoint",
        state_dtype: torch.dtype | None = None,
        arithmetic: str = "float",
        drift_tolerance: float | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(
            denoiser,
            schedule,
            lambda noise_levels: self.make_program(noise_levels, scheme, zeta),
            evaluator=self.make_evaluator,
            memory=memory,
            state_dtype=state_dtype,
            arithmetic=arithmetic,
            drift_tolerance=drift_tolerance,
            memory_budget=memory_budget,
        )

    @classmethod
    def make_program(cls, schedule: Schedule, scheme: str, zeta: float) -> Program:
        """The couplings, see `rex_program`."""
        return rex_program(schedule, scheme, zeta)

    @property
    def denoiser(self) -> Denoiser:
        """The network with its conditions, which the chain's evaluator calls."""
        return cast(Denoiser, cast(RungeKuttaSlope, self.evaluator).network)

    def inverse(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undoes `__call__`.

        Args:
            x: The picture's latents, (B, C, ...).
            y: The second latent of the pair. None is a guess for a picture that no chain has made: x, or, where the
                last step leaves the second latent behind, one DDIM step back from x.

        Returns:
            The noise, twice: the pair that leads to exactly these latents.
        """
        return super().inverse(x, self._second(x) if y is None else y)

    def state(self, x: Tensor, y: Tensor | None = None, end: str = "noise") -> LatticeState:
        """Rounds latents to a state, see `Chain.state`. They are given as to `__call__` or `inverse`, by `end`."""
        if y is None and end == "image":
            with torch.no_grad():
                y = self._second(x)
        return super().state(x, y, end)

    def _second(self, x: Tensor) -> Tensor:
        """The second latent at the picture's end, by a guess."""
        check_latents(x, None)
        is_behind = self.program and self.program[-1].target == 0
        return step_back(self.denoiser, self.schedule, x, self.state_dtype) if is_behind else x

    @property
    def num_network_calls(self) -> int:
        """How often one run calls the network, and its gradient with a graph again."""
        return sum(len(cast(Stages, coupling.tag)) for coupling in self.program)
