"""Gradients of exact arithmetic, for every solver that can be undone: plain autograd at the points of the lattice."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from conftest import Counting, TinyNet, conditions, latents, pull, relative, sd_scheduler
from tolerances import FP64
from torch import Tensor

from doodl_fast import BDIA, EDICT, OBELM, Denoiser, Rex, RexSDE, Schedule

SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "EDICT": (EDICT, {}),
    "BDIA": (BDIA, {}),
    "BDIA, gamma 0.5": (BDIA, {"gamma": 0.5}),
    "O-BELM": (OBELM, {}),
    "Rex, Euler": (Rex, {"scheme": "euler"}),
    "Rex, midpoint": (Rex, {"scheme": "midpoint"}),
    "Rex, RK4": (Rex, {"scheme": "rk4"}),
    "Rex SDE, midpoint": (RexSDE, {"scheme": "midpoint"}),
}
DIFFUSION = Schedule.from_scheduler(sd_scheduler(), 5)
FLOW = Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 5)
BELOW_1 = Schedule.flow([950, 700, 400, 150], [0.95, 0.7, 0.4, 0.15, 0.02])
"""Rex for the SDE does not start at sigma 1, where the latents are nothing but noise."""

CLOSE = {"exact": 1e-2, "exact64": 1e-6}
"""How near the lattice's latents are to those of floating point, which may differ here: O-BELM's flow from sigma 1 is
the worst (1.5e-3, 9.5e-8), then Rex for the SDE (2e-4, 1e-8), then the others (at most 1e-5, 5e-10)."""


class Points(TinyNet):
    """A network that notes the latents that it is called with, or, with `replay`, is called with noted ones instead.

    Replayed points have the values of the notes and the gradient of the latents in whose place they stand.
    """

    def __init__(self, replay: list[Tensor] | None = None) -> None:
        super().__init__()
        self.notes: list[Tensor] = []
        self.replay = replay

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if self.replay is not None:
            x = x + (self.replay[len(self.notes)] - x).detach()
        self.notes.append(x.detach().clone())
        return super().forward(x, t, cond, shift)


@pytest.mark.parametrize("memory", ["checkpoint", "auto", 2, "reversible"])
@pytest.mark.parametrize("arithmetic", ["exact", "exact64"])
@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_is_plain_autograds_at_the_same_points(name: str, kind: str, arithmetic: str, memory: Any) -> None:
    solver, own = SOLVERS[name]
    schedule = DIFFUSION if kind == "diffusion" else BELOW_1 if solver is RexSDE else FLOW
    x = latents(1, 3, 4, grad=True)[0]

    def run(network: Any, **options: Any) -> tuple[Any, list[Tensor]]:
        cond, uncond = (c.requires_grad_() for c in conditions())
        chain = solver(Denoiser(network, cond, uncond, 3.0), schedule, **own, **options)
        if solver is RexSDE:
            chain.step_noise = chain.draw_noise(x.detach(), seed=4)
        return chain, [x, cond, uncond]

    notes = Points().double()
    exact, _ = run(notes, arithmetic=arithmetic, memory="checkpoint")
    exact(x.detach())
    counting = Counting(TinyNet().double())
    exact, inputs = run(counting, arithmetic=arithmetic, memory=memory)
    ends = exact(x)
    found = pull(ends, inputs)
    if memory != "auto":  # which measures the network first
        assert len(counting.calls) == 2 * exact.num_network_calls
    naive, inputs = run(Points(notes.notes).double(), memory="naive")
    wanted = naive(x)
    assert all(relative(end, want) < CLOSE[arithmetic] for end, want in zip(ends, wanted, strict=True))
    for got, want in zip(found, pull(wanted, inputs), strict=True):
        assert want.norm() > 0 and relative(got, want) < FP64
