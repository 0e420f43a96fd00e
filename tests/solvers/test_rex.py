"""Rex: against diffusers' steps, against plain autograd, there and back, and its timesteps between those of a table."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Counting, TinyNet, conditions, latents, pull, relative, sd_scheduler
from tolerances import FP32, FP64, FP64_UNDONE
from torch import Tensor

import doodl_fast
from doodl_fast.chain.chain import Chain
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.clock import PictureClock
from doodl_fast.solvers.coefficients import Level, levels
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.rex import Rex, rex_program

SCHEMES = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusion(steps: int = 4, **changes: Any) -> Schedule:
    return Schedule.from_scheduler(sd_scheduler(**changes), steps)


def flow(steps: int = 4) -> Schedule:
    return Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), steps)


SCHEDULES = {"diffusion": diffusion, "flow": flow}


def rex(
    scheme: str = "midpoint",
    schedule: Schedule | None = None,
    network: Any = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Rex:
    denoiser = Denoiser(network or TinyNet().to(dtype), *conditions(dtype=dtype), 3.0, vjp_dtype=None)
    return Rex(denoiser, schedule or diffusion(), scheme, **options)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_first_euler_step_of_equal_latents_is_ddims(kind: str) -> None:
    schedule, x = SCHEDULES[kind](), latents(1, 3, 4)[0]
    chain = rex("euler", schedule)
    found = Chain(chain.evaluator, chain.program[:1])(x)[0]
    ddim = DDIM(chain.denoiser, schedule)
    assert relative(found, Chain(chain.denoiser, ddim.program[:1])(x)[1]) < 1e-14


def test_the_first_heun_step_of_equal_latents() -> None:
    """Against Heun's method for `y = x / noise` over `signal / noise`, whose slope is the predicted picture."""
    chain, x = rex("heun", diffusion()), latents(1, 3, 4)[0]
    passed = levels(chain.schedule)[:2]
    times = [level.signal / level.noise for level in passed]

    def picture(latent: Tensor, place: int) -> Tensor:
        level, t = passed[place], chain.schedule.timesteps[place]
        return (latent - level.noise * chain.denoiser(latent, t)) / level.signal

    h = times[1] - times[0]
    first = picture(x, 0)
    second = picture(passed[1].noise * (x / passed[0].noise + h * first), 1)
    expected = passed[1].noise * (x / passed[0].noise + h / 2 * (first + second))
    found = Chain(chain.evaluator, chain.program[:1])(x)[0]
    assert relative(found, expected) < 1e-14


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_difference_of_a_pair_shrinks_where_the_solution_is_pulled_together(kind: str) -> None:
    """With the ideal network of one Gaussian. In the variable of the noise it would grow by the reciprocal."""
    schedule = SCHEDULES[kind](20)

    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        level = min(zip(levels(schedule), schedule.timesteps, strict=False), key=lambda pair: abs(pair[1] - float(t)))[
            0
        ]
        picture = level.signal * 0.01 / (level.signal**2 * 0.01 + level.noise**2) * x
        return (x - level.signal * picture) / level.noise - (picture if kind == "flow" else 0)

    chain = Rex(Denoiser(network, None), schedule, "euler", zeta=1.0)
    x, change = latents(1, 3, 4)
    middle = Chain(chain.evaluator, chain.program[:20])
    ends, other = middle(x, x), middle(x, x + 1e-3 * change)
    assert relative(other[0], ends[0]) < 1e-3 * float(change.norm() / ends[0].norm())


def test_timesteps_between_those_of_the_table_are_interpolated_as_in_diffusers() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    clock = PictureClock(diffusion(4))
    table = np.log(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).numpy() ** 0.5)
    for sigma in (0.1, 0.5, 2.0, 9.0):
        expected = float(scheduler._sigma_to_t(np.array([sigma]), table)[0])
        assert clock.timestep(clock.level(1 / sigma)) == pytest.approx(expected, rel=1e-4)
    assert clock.timestep(clock.level(1e5)) == 0 and clock.timestep(clock.level(1e-5)) == 999
    assert PictureClock(flow()).timestep(Level(0.875, 0.125)) == pytest.approx(125)
    by_hand = PictureClock(Schedule.flow([1.0, 0.5], [1.0, 0.5, 0.0]))  # as FLUX counts
    assert by_hand.timestep(Level(0.75, 0.25)) == pytest.approx(0.25)
    single = PictureClock(Schedule((500,), (0.3,), (0.6,)))
    assert single.timestep(Level(0.6**0.5, 0.4**0.5)) == 500


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_network_calls(scheme: str, kind: str) -> None:
    network = Counting(TinyNet().double())
    schedule = SCHEDULES[kind]()
    chain, x = rex(scheme, schedule, network), latents(1, 3, 4, grad=True)[0]
    ends = chain(x)
    # The last step of this diffusion changes nothing. That of the flow leads to the picture: no call comes after it.
    last = 0 if kind == "diffusion" else min(SCHEMES[scheme], 2)
    assert len(network.calls) == chain.num_network_calls == 3 * 2 * SCHEMES[scheme] + last
    pull(ends, [x])
    assert len(network.calls) == 2 * chain.num_network_calls


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_last_step_without_noise_is_finite(scheme: str, prediction_type: str) -> None:
    last = {"set_alpha_to_one": True, "prediction_type": prediction_type}
    schedule = flow() if prediction_type == "flow" else diffusion(**last)
    chain = rex(scheme, schedule)
    x = latents(1, 3, 4)[0]
    picture, before = chain(x)
    assert picture.isfinite().all() and before.isfinite().all()
    back = chain.inverse(picture, before)  # Four coarse steps amplify more rounding than many small ones.
    assert relative(back[0], x) < 10 * FP64_UNDONE and relative(back[1], x) < 10 * FP64_UNDONE


@pytest.mark.parametrize("memory", ["checkpoint", "auto", 1, 2, "reversible"])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_is_that_of_plain_autograd(scheme: str, kind: str, memory: Any) -> None:
    x, _ = latents(2, 3, 4, grad=True)
    gradients = []
    for mode in ("naive", memory):
        cond, uncond = (c.requires_grad_() for c in conditions())
        denoiser = Denoiser(TinyNet().double(), cond, uncond, 3.0)
        chain = Rex(denoiser, SCHEDULES[kind](), scheme, memory=mode)
        gradients.append(pull(chain(x), [x, cond, uncond]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < FP64


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_exact_arithmetic_comes_back_to_the_bit(scheme: str, kind: str) -> None:
    chain = rex(scheme, SCHEDULES[kind](), arithmetic="exact", dtype=torch.float32)
    start = chain.state(latents(1, 3, 4, dtype=torch.float32)[0])
    back = chain.inverse_state(chain.forward_state(start))
    assert all(torch.equal(a, b) for a, b in zip(back.tensors(), start.tensors(), strict=True))
    x = latents(1, 3, 4, grad=True)[0]
    exact = rex(scheme, SCHEDULES[kind](), arithmetic="exact64")
    plain = rex(scheme, SCHEDULES[kind]())
    assert relative(exact(x)[0], plain(x)[0]) < 1e-6
    assert relative(*(pull(each(x), [x])[0] for each in (exact, plain))) < FP32


def test_half_precision_networks_are_scaled_as_others_are() -> None:
    x = latents(1, 3, 4, dtype=torch.float32, grad=True)[0]
    found = rex(network=TinyNet().half(), dtype=torch.float16)(x)
    expected = rex(network=TinyNet().half().double(), dtype=torch.float64)(x.double())
    assert relative(found[0], expected[0]) < 0.02
    (gradient,) = torch.autograd.grad((found[0] * 1e-9).sum(), x)
    (exact,) = torch.autograd.grad((expected[0] * 1e-9).sum(), x)
    assert relative(gradient, exact) < 0.05


def test_from_pipeline_and_optimize(tmp_path: Any) -> None:
    import tiny_pipeline

    pipe = tiny_pipeline.stable_diffusion(tmp_path)
    chain = doodl_fast.Rex.from_pipeline(pipe, "a dog", num_inference_steps=2, scheme="heun", memory="checkpoint")
    assert chain.denoiser.unet is pipe.unet and chain.num_network_calls > 0
    x = chain.noise()
    result = doodl_fast.optimize(chain, x, lambda z: z, lambda z: z.square().mean(), 3, grad_scale=5, progress=False)
    assert result.final_loss < result.losses[0] and len(result.images) == 1


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="scheme: expected one of 'euler', 'midpoint', 'heun', 'rk4', got 'rk5'"):
        rex_program(diffusion(), "rk5")
    with pytest.raises(ValueError, match=r"zeta: expected a number in \(0, 1\], got 0; 0.999 is the paper's choice"):
        rex_program(diffusion(), "euler", 0)
    zero = diffusion(1, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
                     set_alpha_to_one=True)  # fmt: skip
    with pytest.raises(ValueError, match="schedule: expected a noise level between pure noise and the picture, got a "):
        rex_program(zero)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pure_noise_at_the_start_is_undone_too(scheme: str, prediction_type: str) -> None:
    """Zero terminal signal-to-noise, there and back."""
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction_type}
    chain, x = rex(scheme, diffusion(6, **zero)), latents(1, 3, 4)[0]
    assert chain.schedule.alphas_cumprod[0] == 0
    ends = chain(x)
    assert relative(ends[0], x) > 0.1
    assert relative(chain.inverse(*ends)[0], x) < FP64_UNDONE
    exact = rex(scheme, diffusion(6, **zero), arithmetic="exact64")
    start = exact.state(x)
    assert exact.inverse_state(exact.forward_state(start)).equals(start)
