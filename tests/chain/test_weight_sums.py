"""Gradients of weights are summed over the evaluations in float32 or better, also for networks in half precision."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, MEMORY_MODES, TinyNet, conditions, latents, relative, sd_scheduler
from torch import Tensor, nn

from doodl_fast import DDIM, EDICT, Denoiser, Schedule

STEPS = 200


class Constant(nn.Module):
    """Predicts a number for each channel, whatever the picture is, so that each evaluation adds about as much."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 0.5, dtype=dtype, device=DEVICE))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.weight.view(1, 3, 1, 1).expand_as(x)


def gradient(dtype: torch.dtype, memory: str, **options: torch.dtype | None) -> Tensor:
    """The weight's gradient of the mean of the picture."""
    network = Constant(dtype)
    denoiser = Denoiser(network, torch.zeros(1, 1, device=DEVICE), trainable=True, **options)
    chain = DDIM(denoiser, Schedule.from_scheduler(sd_scheduler(), STEPS), memory=memory)
    chain(latents(1, 3, 2, 2)[0])[0].mean().backward()
    assert network.weight.grad is not None
    return network.weight.grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"vjp_dtype": None}, {}], ids=["own dtype", "default"])
def test_sums_of_half_precision_networks_are_not_rounded(dtype: torch.dtype, options: dict[str, None]) -> None:
    expected = gradient(torch.float64, "naive")
    found = gradient(dtype, "checkpoint", **options)
    unit = torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert relative(found.double(), expected) < unit  # one rounding of the sum, and those of 200 small terms
    # What it would be if 200 terms were added one by one in that dtype.
    term, total = (expected / STEPS).to(dtype), torch.zeros(3, dtype=dtype, device=DEVICE)
    for _ in range(STEPS):
        total = total + term
    assert relative(total.double(), expected) > 2 * unit


@pytest.mark.parametrize("mode", ["checkpoint", "reversible", "exact"])
def test_ten_steps_have_the_gradient_of_plain_autograd(mode: str) -> None:
    found = {}
    for name, options in {"naive": {"memory": "naive"}, mode: MEMORY_MODES[mode]}.items():
        network = TinyNet().double()
        denoiser = Denoiser(network, *conditions(), 3.0, vjp_dtype=None, trainable=True)
        chain = EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), 10), **options)
        x0, y0 = chain(latents(1, 3, 8, 8)[0])
        found[name] = torch.autograd.grad(x0.square().sum() + y0.sum(), list(network.parameters()))
    for ours, theirs in zip(found[mode], found["naive"], strict=True):
        assert relative(ours, theirs) < 1e-10 and float(theirs.norm()) > 1e-6
