"""Explicit Runge-Kutta steps as one function of the latents, which calls the network several times."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chain.evaluator import Evaluator, Recordings
from .clock import Clock
from .coefficients import Level


class Tableau(NamedTuple):
    """The coefficients of an explicit Runge-Kutta scheme (Butcher's tableau).

    Attributes:
        nodes: Where in the step each stage is evaluated, from 0 to 1.
        rows: What each stage takes of the slopes of the stages before it.
        weights: What the step takes of each slope. They add up to 1.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


SCHEMES = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": Tableau((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


class Stage(NamedTuple):
    """One call of the network, at `keep * x + sum(takes * slopes)`.

    Attributes:
        timestep: What the network is given.
        keep: What x is multiplied by.
        takes: What the slopes of the stages before are multiplied by.
        per_x: The stage's slope is `per_x * point + per_output * network(point)`.
        per_output: See `per_x`.
        weight: What the whole step takes of the slope.
    """

    timestep: int | float
    keep: float
    takes: tuple[float, ...]
    per_x: float
    per_output: float
    weight: float


@dataclass(frozen=True)
class Stages:
    """The stages of a step, as the tag of its coupling."""

    stages: tuple[Stage, ...]

    def __len__(self) -> int:
        return len(self.stages)

    def __str__(self) -> str:
        return " and ".join(f"{stage.timestep:g}" for stage in self.stages)


def make_stages(clock: Clock, start: Level, end: Level, tableau: Tableau) -> Stages:
    """The stages of the step from one noise level to another, in either direction."""
    length = clock.time(end) - clock.time(start)
    stages = []
    for node, row, weight in zip(tableau.nodes, tableau.rows, tableau.weights, strict=True):
        at = {0.0: start, 1.0: end}.get(node) or clock.level(clock.time(start) + node * length)
        scale = clock.scale(at)
        takes = tuple(scale * length * share for share in row)
        stages.append(Stage(clock.timestep(at), scale / clock.scale(start), takes, *clock.slope(at), weight))
    return Stages(tuple(stages))


class RungeKuttaSlope(Evaluator):
    """The mean slope of a Runge-Kutta step: `step = length * slope(x)`, of a network that is called in every stage.

    Args:
        network: The network with its conditions, a `Denoiser` for instance. Its timesteps are those of the stages.
    """

    def __init__(self, network: Evaluator) -> None:
        self.network = network

    def with_network(self, network: Evaluator) -> RungeKuttaSlope:
        """The same function of another network."""
        return RungeKuttaSlope(network)

    def __call__(
        self,
        x: Tensor,
        t: Stages,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """The mean slope at x.

        Args:
            x: Latents (B, C, ...).
            t: The stages of the step.
            tensors: See `Evaluator`.
            latents_dtype: See `Evaluator`.
            added: What is added to the slope in every stage.
        """
        slopes: list[Tensor] = []
        for stage in t.stages:
            point = stage.keep * x if stage.keep != 1 else x
            for share, slope in zip(stage.takes, slopes, strict=True):
                if share:
                    point = point + share * slope
            slope = stage.per_output * self.network(point, stage.timestep, tensors, latents_dtype)
            slope = slope + stage.per_x * point if stage.per_x else slope
            slopes.append(slope if added is None else slope + added)
        parts = [stage.weight * slope for stage, slope in zip(t.stages, slopes, strict=True) if stage.weight]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    @property
    def guidance_scale(self) -> Any:
        """That of the network, if it has one."""
        return getattr(self.network, "guidance_scale", None)

    def tensors(self) -> tuple[Tensor, ...]:
        """The conditions of the network."""
        return self.network.tensors()

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        """The dtype that the network computes in."""
        return self.network.compute_dtype(latents_dtype)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """The context of the network's runs."""
        return self.network.running()

    def for_vjp(self) -> RungeKuttaSlope | None:
        """The same with the network that VJPs are taken of."""
        other = self.network.for_vjp()
        return None if other is None else self.with_network(other)

    @property
    def insists_on_vjps(self) -> bool:
        """Whether the network's `vjp_dtype` was named."""
        return self.network.insists_on_vjps

    def for_blocks(self) -> RungeKuttaSlope | None:
        """The same with a network that checkpoints its blocks."""
        other = self.network.for_blocks()
        return None if other is None else self.with_network(other)

    def for_recompute(self) -> RungeKuttaSlope | None:
        """The same with a network whose graphs keep less."""
        other = self.network.for_recompute()
        return None if other is None else self.with_network(other)

    def plain(self) -> RungeKuttaSlope:
        """The same with a network that is differentiated by PyTorch alone."""
        return self.with_network(self.network.plain())

    def recordings(self, device: torch.device) -> Recordings | None:
        """Those of the network's calls."""
        return self.network.recordings(device)

    def launched(self) -> RungeKuttaSlope:
        """The same with a network whose calls are never replayed."""
        return self.with_network(self.network.launched())

    def weights(self) -> tuple[tuple[str, Tensor], ...]:
        """The parameters and buffers of the network."""
        return self.network.weights()
