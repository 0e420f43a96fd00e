"""Chains that sample as a diffusers scheduler does, against that scheduler itself and against plain autograd."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import tiny_pipeline
import torch
from conftest import Counting, TinyNet, conditions, golden_denoiser, latents, relative
from tolerances import FP32, FP64

import doodl_fast
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.diffusion.tracing import SamplerSteps
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.sampler import LCM, DPMSolver, Sampler, UniPC

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DETERMINISTIC = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDIM, v": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler, Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM++ 2M, Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "flow, Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow, Heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
NOISY = {
    "DDIM, eta 1": ("DDIMScheduler", {"clip_sample": False}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "flow, LCM": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "flow, stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
}
STEP_OPTIONS = {"DDIM, eta 1": {"eta": 1.0}}
STEPS = 6


def scheduler_of(name):
    kind, options = {**DETERMINISTIC, **NOISY}[name]
    make = getattr(diffusers, kind)
    known = inspect.signature(make.__init__).parameters
    return make(**{key: value for key, value in STABLE_DIFFUSION.items() if key in known}, **options)


def by_the_scheduler(scheduler, denoiser, x, generator=None, extra=None):
    """Diffusers' own loop."""
    scheduler.set_timesteps(STEPS)
    has_noise = "generator" in inspect.signature(scheduler.step).parameters
    extra = {**(extra or {}), **({"generator": generator} if has_noise else {})}
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
            x = scheduler.step(denoiser(scale(x, t), t), t, x, **extra).prev_sample.to(x.dtype)
    return x


@pytest.mark.parametrize("name", [*DETERMINISTIC, *NOISY])
def test_pictures_are_those_of_the_scheduler(name):
    scheduler, denoiser, x = scheduler_of(name), golden_denoiser(torch.float64), latents(1, 4, 16, 16)[0]
    options = STEP_OPTIONS.get(name, {})
    chain = Sampler(denoiser, SamplerSteps.from_scheduler(scheduler, STEPS, options))
    # These schedulers draw their noise in float32 whatever the latents' dtype.
    like = x.float() if "SDE" in name or "stochastic" in name else x
    noise = [z.double() for z in chain.draw_noise(like, generator=torch.Generator().manual_seed(7))]
    assert bool(noise) == (name in NOISY)
    (picture,) = chain(x, noise)
    expected = by_the_scheduler(scheduler, denoiser, x, torch.Generator().manual_seed(7), options)
    assert relative(picture, expected) < FP32


@pytest.mark.parametrize("memory", ["checkpoint", "auto"])
@pytest.mark.parametrize("name", ["Heun", "PNDM", "DPM++ 2M", "UniPC", *NOISY])
def test_gradient_is_that_of_plain_autograd(name, memory):
    """With respect to the start, to every noise that a step adds, and to the conditions."""
    steps = SamplerSteps.from_scheduler(scheduler_of(name), STEPS, STEP_OPTIONS.get(name))
    x = latents(1, 3, 4, grad=True)[0]
    gradients = []
    for mode in ("naive", memory):
        cond, uncond = (c.requires_grad_() for c in conditions())
        network = Counting(TinyNet().double())
        chain = Sampler(Denoiser(network, cond, uncond, 3.0), steps, memory=mode)
        noise = [z.requires_grad_() for z in chain.draw_noise(x)]
        assert bool(noise) == (name in NOISY)
        (picture,) = chain(x, noise)
        if memory != "auto":  # which measures the network first
            # An output that no step uses (PNDM has one) is not computed.
            assert len(network.calls) == chain.num_network_calls <= len(steps)
        gradients.append(torch.autograd.grad(picture.square().sum(), [x, *noise, cond, uncond]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < FP64


@pytest.mark.parametrize(
    ("solver", "kind"),
    [
        (Sampler, "DDIMScheduler"),
        (DPMSolver, "DPMSolverMultistepScheduler"),
        (UniPC, "UniPCMultistepScheduler"),
        (LCM, "LCMScheduler"),
    ],
)
def test_latents_are_those_of_the_pipeline(tmp_path, solver, kind):
    """The whole way from prompt to latents, against the pipeline with the scheduler of that name."""
    pipe = tiny_pipeline.stable_diffusion(tmp_path)
    chain = solver.from_pipeline(pipe, "a red circle", num_inference_steps=STEPS, memory="checkpoint")
    x = chain.noise(seed=3)
    if kind != "DDIMScheduler":
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a red circle",
        num_inference_steps=STEPS,
        latents=x.clone(),
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
    ).images
    noise = chain.draw_noise(x, generator=torch.Generator().manual_seed(11))
    assert relative(chain(x, noise)[0], expected) < FP32


def test_dynamic_shifting_of_flows():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    denoiser = golden_denoiser(torch.float32)
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    (picture,) = Sampler(denoiser, SamplerSteps.from_scheduler(scheduler, STEPS, mu=0.9))(x)
    scheduler.set_timesteps(STEPS, mu=0.9)
    expected = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected = scheduler.step(denoiser(expected, t), t, expected).prev_sample
    assert relative(picture, expected) < 1e-5


def test_eta_adds_noise():
    scheduler = scheduler_of("DDIM")
    steps = SamplerSteps.from_scheduler(scheduler, STEPS, step_options={"eta": 1.0})
    assert steps.num_draws == STEPS - 1 and "5 draws of noise" in repr(steps)


def test_optimize_takes_a_sampler_that_adds_noise():
    steps = SamplerSteps.from_scheduler(scheduler_of("LCM"), 4)
    chain = Sampler(Denoiser(TinyNet().double(), *conditions()), steps)
    x = latents(1, 3, 4)[0]
    chain.step_noise = chain.draw_noise(x)
    result = doodl_fast.optimize(chain, x, lambda z: z, lambda z: z.square().mean(), 3, grad_scale=5, progress=False)
    assert result.final_loss < result.losses[0]


def test_what_is_refused():
    denoiser, x = Denoiser(TinyNet().double(), *conditions()), latents(1, 3, 4)[0]
    chain = Sampler(denoiser, SamplerSteps.from_scheduler(scheduler_of("LCM"), 4))
    with pytest.raises(ValueError, match=r"noise: expected 3 tensors, as LCMScheduler adds noise that often, got none"):
        chain(x)
    with pytest.raises(ValueError, match=r"noise: expected 3 tensors, .* got 1; use noise=chain.draw_noise\(x\)"):
        chain(x, [x])
    with pytest.raises(ValueError, match=r"latents\[2\]: expected x's shape \(1, 3, 4\), got \(1, 3\)"):
        chain(x, [x, x[..., 0], x])
    with pytest.raises(ValueError, match=r"inverse: Sampler cannot be inverted"):
        chain.inverse(x)
    with pytest.raises(TypeError, match=r"schedule: expected a SamplerSteps, got str; use SamplerSteps.from_scheduler"):
        Sampler(denoiser, "DDIM")
    with pytest.raises(TypeError, match=r"scheduler: expected a diffusers scheduler .* got int"):
        SamplerSteps.from_scheduler(3, 4)
    clipped = diffusers.DDIMScheduler(clip_sample=True)
    with pytest.raises(ValueError, match=r"DDIMScheduler are not linear .* switch off clip_sample and thresholding"):
        SamplerSteps.from_scheduler(clipped, 4)
    with pytest.raises(ValueError, match=r"the steps of RePaintScheduler cannot be read off \(TypeError"):
        SamplerSteps.from_scheduler(diffusers.RePaintScheduler(), 4)


@pytest.mark.parametrize(
    ("solver", "kind"), [(Sampler, "DDIMScheduler"), (DPMSolver, "DPMSolverMultistepScheduler"), (LCM, "LCMScheduler")]
)
def test_a_schedule_that_was_read_off_a_scheduler_will_do(solver, kind):
    scheduler, denoiser, x = scheduler_of("DDIM"), golden_denoiser(torch.float64), latents(1, 4, 16, 16)[0]
    steps = SamplerSteps.from_scheduler(getattr(diffusers, kind).from_config(scheduler.config), STEPS)
    chains = [solver(denoiser, schedule) for schedule in (Schedule.from_scheduler(scheduler, STEPS), steps)]
    noise = chains[0].draw_noise(x)
    assert torch.equal(*(chain(x, noise)[0] for chain in chains))


def test_a_flow_schedule_keeps_its_shift():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    schedule = Schedule.from_scheduler(scheduler, STEPS, mu=0.7)
    denoiser, x = Denoiser(TinyNet().double(), *conditions()), latents(1, 3, 4)[0]
    assert relative(Sampler(denoiser, schedule)(x)[0], DDIM(denoiser, schedule)(x)[0]) < 1e-6


def test_schedules_without_a_scheduler_and_exact_arithmetic_are_refused():
    denoiser, by_hand = Denoiser(TinyNet().double(), *conditions()), Schedule((1,), (0.5,), (0.9,))
    with pytest.raises(
        ValueError, match=r"schedule: expected one that was read off a diffusers scheduler, got .* hand"
    ):
        Sampler(denoiser, by_hand)
    for solver in (Sampler, DDIM):
        with pytest.raises(ValueError, match=r"arithmetic: 'exact' needs couplings of two latents that can be undone"):
            solver(denoiser, Schedule.from_scheduler(scheduler_of("DDIM"), 4), arithmetic="exact")
