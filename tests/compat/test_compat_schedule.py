"""`compat.schedule` against the schedules that were recorded from the reference, with and without quirks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import DTYPES, golden, relative, sd_scheduler
from tolerances import FP64

from doodl_fast.compat import Quirks
from doodl_fast.compat.schedule import (
    DEFAULT,
    ReferenceScheduler,
    forward_step,
    get_alpha_and_beta,
    reference_schedule,
    reverse_step,
)
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import ddim_coefficients

STEPS = (5, 10, 20, 25, 30, 50)


def scheduler_of(kind: str, steps: int, quirks: Quirks = DEFAULT):
    scheduler = ReferenceScheduler(quirks) if kind == "reference" else sd_scheduler()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["reference", "diffusers"])
def test_table_is_the_recorded_one(kind, steps):
    names = ("t", "alpha", "alpha_prev", "fwd_sample", "fwd_eps")
    recorded = {name: golden("schedule")[f"{kind}/T{steps}/{name}"].cpu() for name in names}
    scheduler = scheduler_of(kind, steps)
    assert scheduler.timesteps.tolist() == recorded["t"].tolist()
    schedule = reference_schedule(scheduler.timesteps, scheduler, steps)
    for name, got in (("alpha", schedule.alphas_cumprod), ("alpha_prev", schedule.alphas_cumprod_prev)):
        assert relative(torch.tensor(got, dtype=torch.float64), recorded[name]) < FP64, name
    rows = zip(schedule.alphas_cumprod, schedule.alphas_cumprod_prev, strict=True)
    a, _, b = torch.tensor([ddim_coefficients(*row, "epsilon") for row in rows], dtype=torch.float64).T
    assert relative(a, recorded["fwd_sample"]) < FP64
    assert relative(b, recorded["fwd_eps"]) < FP64


@pytest.mark.parametrize("kind", ["reference", "diffusers"])
def test_alpha_between_timesteps(kind):
    scheduler, recorded = scheduler_of(kind, 50), golden("schedule")
    for t, alpha in zip(recorded[f"{kind}/fractional/t"], recorded[f"{kind}/fractional/alpha"], strict=True):
        got = get_alpha_and_beta(t.float().cpu(), scheduler)
        assert got == pytest.approx((float(alpha), 1 - float(alpha)), rel=1e-12)


@pytest.mark.parametrize("steps", [30, 50])
def test_steps_at_every_timestep(steps):
    scheduler = scheduler_of("reference", steps)
    one = torch.ones(1, 1, dtype=torch.float64)
    prefix = f"reference/T{steps}/every_t"
    table = {
        name: golden("schedule")[f"{prefix}/{name}"] for name in ("fwd_sample", "fwd_eps", "rev_sample", "rev_eps")
    }
    for t in (*range(0, scheduler.timesteps.max() + 1, 37), *scheduler.timesteps.tolist()):
        for step, name in ((forward_step, "fwd"), (reverse_step, "rev")):
            of_sample = step(scheduler, 0 * one, torch.tensor(t), one)
            of_noise = step(scheduler, one, torch.tensor(t), 0 * one)
            assert float(of_sample) == pytest.approx(float(table[f"{name}_sample"][t]), rel=1e-12)
            assert float(of_noise) == pytest.approx(float(table[f"{name}_eps"][t]), rel=1e-9, abs=1e-14)


def test_without_quirks_it_is_diffusers_ddim_schedule():
    """Alphas are float32, there are as many timesteps as asked for, and each step leads to the next timestep."""
    none = Quirks.none()
    for steps in (30, 50):
        got = reference_schedule(
            scheduler_of("reference", steps, none).timesteps, ReferenceScheduler(none), steps, none
        )
        want = Schedule.from_scheduler(sd_scheduler(), steps)
        assert got.timesteps == want.timesteps
        assert got.alphas_cumprod == pytest.approx(want.alphas_cumprod, rel=1e-6)
        assert got.alphas_cumprod_prev == pytest.approx(want.alphas_cumprod_prev, rel=1e-6)


def test_each_quirk_of_the_schedule_changes_it_alone():
    def table(**off: bool) -> tuple:
        quirks = Quirks(**off)
        scheduler = scheduler_of("reference", 30, quirks)
        return dataclasses.astuple(reference_schedule(scheduler.timesteps, scheduler, 30, quirks))

    assert len(table()[0]) == 31 and len(table(extra_timesteps=False)[0]) == 30
    assert table(fractional_timesteps=False)[2][:-1] == table()[1][1:]
    swapped, plain = table()[2], table(swapped_interpolation=False)[2]
    scheduler = scheduler_of("reference", 30)
    low, high = float(scheduler.alphas_cumprod[956]), float(scheduler.alphas_cumprod[957])
    # t = 956.67: two thirds of the way from 956 to 957
    assert swapped[0] == pytest.approx(low * 2 / 3 + high / 3, rel=1e-6)
    assert plain[0] == pytest.approx(low / 3 + high * 2 / 3, rel=1e-6)
    assert table(float64_alphas=False)[1] != table()[1]
    assert table(float64_alphas=False)[1] == pytest.approx(table()[1], rel=1e-6)


def test_prediction_type_is_heeded_on_request():
    scheduler = sd_scheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(10)
    assert reference_schedule(scheduler.timesteps, scheduler, 10).prediction_type == "epsilon"
    quirks = Quirks(ignored_prediction_type=False)
    assert reference_schedule(scheduler.timesteps, scheduler, 10, quirks).prediction_type == "v_prediction"


def test_half_updates():
    """With the quirk, terms in fp16 are rounded one by one. Without it, only the result is rounded."""
    scheduler = scheduler_of("reference", 10)
    sample, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).half()
    exact = forward_step(scheduler, noise.double(), 500, sample.double())
    plain = forward_step(scheduler, noise, 500, sample, Quirks(half_updates=False))
    quirky = forward_step(scheduler, noise, 500, sample)
    assert plain.dtype == quirky.dtype == torch.float16
    assert (plain.double() - exact).norm() < 0.9 * (quirky.double() - exact).norm()
    assert torch.equal(plain, exact.half())
    assert relative(quirky, exact) < 2e-3


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "fp16"])
def test_reverse_undoes_forward_and_both_are_differentiable(dtype):
    scheduler, dtype = scheduler_of("diffusers", 25), DTYPES[dtype]
    x, noise = torch.randn(2, 1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    x, noise = x.requires_grad_(), noise.requires_grad_()
    back = reverse_step(scheduler, noise, 440, forward_step(scheduler, noise, 440, x))
    assert relative(back, x) < 4 * torch.finfo(dtype).eps
    to_x, to_noise = torch.autograd.grad(back.sum(), [x, noise])
    assert relative(to_x, torch.ones_like(x)) < 4 * torch.finfo(dtype).eps
    assert to_noise.abs().max() < 4 * torch.finfo(dtype).eps


def test_errors():
    scheduler = scheduler_of("reference", 10)
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"timestep: expected at most 900, the scheduler's first, got 901"):
        forward_step(scheduler, x, 901, x)
    with pytest.raises(ValueError, match="scheduler: expected one that knows its timesteps; call its set_timesteps"):
        reverse_step(ReferenceScheduler(), x, 0, x)
    with pytest.raises(ValueError, match="num_inference_steps: expected an int from 1 to 1000, got 0"):
        ReferenceScheduler().set_timesteps(0)


def test_none_has_no_quirk():
    assert not any(dataclasses.astuple(Quirks.none())) and all(dataclasses.astuple(Quirks()))
