"""Variables besides the starting latents: gradients against plain autograd, options, storage, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, latents, relative, sd_scheduler, tiny_chain
from torch import Tensor

import doodl_fast
from doodl_fast import DDIM, EDICT, Denoiser, Rex, RexSDE, Sampler, SamplerSteps, Schedule

START = latents(2, 3, 4, 4)[0]
SGD = {"optimizer": torch.optim.SGD, "lr": 1.0}
QUIET = {"num_optimization_steps": 1, "progress": False, "perturbation_scale": 0.0, "renormalize_latents": False}


def loss(images: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype, device=images.device)
    return (images.sin() * weights.view_as(images)).sum()


def denoiser(shift: Tensor | None = None, scale: float = 3.0, combine: Any = None) -> Denoiser:
    cond, uncond = conditions()
    options = {} if shift is None else {"shift": shift}
    return Denoiser(TinyNet().double(), cond, uncond, scale, combine=combine, vjp_dtype=None, **options)


def ancestral() -> Any:
    from diffusers import DDPMScheduler

    return SamplerSteps.from_scheduler(DDPMScheduler(clip_sample=False), 4)


CHAINS = {
    "EDICT": lambda d, memory: EDICT(d, Schedule.from_scheduler(sd_scheduler(), 4), memory=memory),
    "DDIM": lambda d, memory: DDIM(d, Schedule.from_scheduler(sd_scheduler(), 4), memory=memory),
    "Rex": lambda d, memory: Rex(d, Schedule.from_scheduler(sd_scheduler(), 3), memory=memory),
    "Sampler": lambda d, memory: Sampler(d, ancestral(), memory=memory),
}


def stepped(name: str, chain: Any, **options: Any) -> list[Tensor]:
    """The gradient of the mean loss with respect to a variable, from one step of SGD with rate 1."""
    seen: list[Any] = []
    result = doodl_fast.optimize(
        chain,
        START,
        None,
        loss,
        variables={name: {**SGD, "renormalize": False, **options}},
        callback_on_step_end=seen.append,
        **QUIET,
    )
    assert torch.equal(result.latents[0], START)
    return [old - new for old, new in zip(seen[0].variables[name], result.variables[name], strict=True)]


def mean_loss(chain: Any, **options: Any) -> Tensor:
    ends = chain(START, **options)[: chain.num_pictures]
    return sum(loss(end) for end in ends) / len(ends)


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("memory", ["checkpoint", "naive", "reversible"])
def test_prompt_embeddings(kind: str, memory: str) -> None:
    if memory == "reversible" and kind in ("Sampler", "DDIM"):
        pytest.skip("its steps cannot be undone")
    given = denoiser()
    chain = CHAINS[kind](given, memory)
    if kind == "Sampler":
        chain.step_noise = chain.draw_noise(START, seed=3)
    (got,) = stepped("prompt_embeds", chain)
    cond = given.cond.clone().requires_grad_()
    other = CHAINS[kind](Denoiser(given.unet, cond, given.uncond, 3.0, vjp_dtype=None), "naive")
    if kind == "Sampler":
        other.step_noise = chain.step_noise
    (expected,) = torch.autograd.grad(mean_loss(other), cond)
    assert relative(got, expected) < 1e-10
    assert not given.cond.requires_grad and chain.denoiser is chain.evaluator if kind != "Rex" else True


@pytest.mark.parametrize("kind", ["EDICT", "Rex"])
@pytest.mark.parametrize("memory", ["checkpoint", 2, "naive"])
def test_the_guidance_scale(kind: str, memory: Any) -> None:
    """Against central differences."""
    (got,) = stepped("guidance_scale", CHAINS[kind](denoiser(), memory))
    step = 1e-5
    up, down = (mean_loss(CHAINS[kind](denoiser(scale=3.0 + s), "checkpoint")) for s in (step, -step))
    assert float(got) == pytest.approx(float(up - down) / (2 * step), rel=1e-7)


def test_any_argument_of_the_network() -> None:
    """A pair of the same tensor for both halves is one variable."""
    shift = torch.tensor([0.3, -0.2], dtype=torch.float64, device=DEVICE)
    (got,) = stepped("shift", CHAINS["EDICT"](denoiser(doodl_fast.Guided(shift, shift)), "checkpoint"))
    leaf = shift.clone().requires_grad_()
    naive = CHAINS["EDICT"](denoiser(doodl_fast.Guided(leaf, leaf)), "naive")
    assert relative(got, torch.autograd.grad(mean_loss(naive), leaf)[0]) < 1e-10


def sde() -> RexSDE:
    return RexSDE(denoiser(), Schedule.from_scheduler(sd_scheduler(), 3))


@pytest.mark.parametrize("make", [sde, lambda: CHAINS["Sampler"](denoiser(), "checkpoint")])
def test_the_noise_of_every_step(make: Any) -> None:
    chain = make()
    chain.step_noise = chain.draw_noise(START, seed=5)
    got = stepped("noise", chain)
    leaves = [z.clone().requires_grad_() for z in chain.step_noise]
    expected = torch.autograd.grad(mean_loss(chain, noise=leaves), leaves)
    assert len(got) == chain.num_draws > 1
    for one, other in zip(got, expected, strict=True):
        assert relative(one, other) < 1e-10


def test_noise_keeps_its_norms_and_is_drawn_where_there_is_none() -> None:
    chain = CHAINS["Sampler"](denoiser(), "checkpoint")
    result = doodl_fast.optimize(chain, START, None, loss, 3, variables={"noise": {"lr": 0.1}}, progress=False)
    drawn = chain.draw_noise(START, seed=1)
    assert chain.step_noise is None and result.final_loss < result.losses[0]
    for new, old in zip(result.variables["noise"], drawn, strict=True):
        assert not torch.equal(new, old)
        assert torch.allclose(new.flatten(1).norm(dim=1), old.flatten(1).norm(dim=1))


def test_several_variables_at_once_and_their_own_loss() -> None:
    """A loss that names a variable gets its gradient directly; the start moves as it would without the others."""

    def close(prompt_embeds: Tensor, start: Tensor) -> Tensor:
        return 0.5 * prompt_embeds.square().sum() + 0 * start.sum()

    chain = CHAINS["EDICT"](denoiser(), "checkpoint")
    variables = {"latents": {}, "prompt_embeds": SGD, "guidance_scale": {"lr": 0.1}}
    result = doodl_fast.optimize(chain, START, None, [loss, close], variables=variables, **QUIET)
    alone = doodl_fast.optimize(chain, START, None, loss, **QUIET)
    assert relative(result.latents[0], alone.latents[0]) < 1e-12
    (through,) = stepped("prompt_embeds", chain)
    cond = chain.denoiser.cond
    assert relative(result.variables["prompt_embeds"][0], cond - through - cond) < 1e-10
    assert float(result.variables["guidance_scale"][0]) == pytest.approx(3.0, abs=0.11)
    assert float(result.variables["guidance_scale"][0]) != 3.0


def test_options_and_values() -> None:
    chain = CHAINS["EDICT"](denoiser(), "checkpoint")
    (whole,) = stepped("prompt_embeds", chain)
    (scaled,) = stepped("prompt_embeds", chain, grad_scale=2.0, lr=0.5)
    (clipped,) = stepped("prompt_embeds", chain, clip_grad_value=1e-3)
    assert relative(scaled, whole) < 1e-10 and torch.allclose(clipped, whole.clamp(-1e-3, 1e-3), rtol=0, atol=1e-15)
    (at_four,) = stepped("guidance_scale", chain, value=4.0)
    (expected,) = stepped("guidance_scale", CHAINS["EDICT"](denoiser(scale=4.0), "checkpoint"))
    assert float(at_four) == pytest.approx(float(expected), rel=1e-10)


def test_the_gradient_is_carried_in_the_callers_memory_plan() -> None:
    """With memory="auto" a copy of the chain plans for itself, and the caller's chain stays as it was."""
    chain = CHAINS["EDICT"](denoiser(), "auto")
    (got,) = stepped("prompt_embeds", chain)
    (expected,) = stepped("prompt_embeds", CHAINS["EDICT"](denoiser(), "checkpoint"))
    assert relative(got, expected) < 1e-10 and isinstance(chain.evaluator, Denoiser)


def test_a_run_with_variables_and_schedules_is_resumed_to_the_bit(tmp_path: Any) -> None:
    def arguments(**changes: Any) -> dict[str, Any]:
        def cosine(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)

        def steps(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])

        variables = {"start": {"scheduler": steps}, "noise": {"lr": 0.05}, "prompt_embeds": {"lr": 0.01}}
        given = {"variables": variables, "scheduler": cosine, "progress": False, **changes}
        return {"chain": CHAINS["Sampler"](denoiser(), "checkpoint"), "latents": START, "decode": None, **given}

    whole = doodl_fast.optimize(**arguments(), loss=loss, num_optimization_steps=5)
    doodl_fast.optimize(**arguments(folder=tmp_path), loss=loss, num_optimization_steps=3)
    resumed = doodl_fast.optimize(**arguments(resume=tmp_path), loss=loss, num_optimization_steps=5)
    assert torch.equal(whole.latents[0], resumed.latents[0]) and whole.losses == resumed.losses
    for name, tensors in whole.variables.items():
        assert all(map(torch.equal, tensors, resumed.variables[name]))
    with pytest.raises(ValueError, match=r"resume: the run .* had variables=\['noise', 'prompt_embeds', 'start'\]"):
        doodl_fast.optimize(**arguments(resume=tmp_path, variables=["start"]), loss=loss, num_optimization_steps=6)
    with pytest.raises(ValueError, match="resume: the saved run used a scheduler; pass the same scheduler="):
        doodl_fast.optimize(**arguments(resume=tmp_path, scheduler=None), loss=loss, num_optimization_steps=6)


def test_the_best_step_has_its_variables() -> None:
    chain = CHAINS["EDICT"](denoiser(), "checkpoint")
    variables = {"prompt_embeds": {"optimizer": torch.optim.SGD, "lr": 0.3}}
    result = doodl_fast.optimize(chain, START, None, loss, 6, variables=variables, progress=False)
    assert 0 < result.best_step < 6, "the steps are meant to overshoot"
    best = doodl_fast.optimize(
        chain,
        START,
        None,
        loss,
        1,
        progress=False,
        callback_on_step_end=lambda info: True,
        variables={"prompt_embeds": {"value": result.best_variables["prompt_embeds"]}},
    )
    assert best.final_loss == pytest.approx(result.best_loss, rel=1e-10)
    assert relative(best.images[0], result.best_images[0]) < 1e-10


@pytest.mark.parametrize(
    ("variables", "error", "message"),
    [
        (3, TypeError, "variables: expected names, or a dict from names to options .*, got int"),
        ([], ValueError, "variables: expected at least one variable, got none"),
        (["start", "latents"], ValueError, "variables: expected each variable once, got 'start' twice"),
        (["colour"], ValueError, "variables: expected names among start, noise, guidance_scale, prompt_embeds, .*"),
        (["noise"], ValueError, r"variables\['noise'\]: expected a chain whose steps add noise, got EDICT"),
        ({"prompt_embeds": 0.1}, TypeError, r"variables\['prompt_embeds'\]: expected a dict of options .*, got float"),
        ({"prompt_embeds": {"speed": 1}}, TypeError, r"variables\['prompt_embeds'\]: .*speed"),
        ({"prompt_embeds": {"clip_grad_value": 0}}, ValueError, "expected a positive number for clip_grad_value"),
        ({"prompt_embeds": {"value": torch.ones(3)}}, ValueError, r"expected a value of 1 tensor\(s\) of shape \(1, 5"),
        ({"start": {"lr": 1.0}}, ValueError, r"variables\['start'\]: expected optimizer= with the option 'lr'"),
        ({"start": {"value": START}}, ValueError, "expected no value, which the argument latents gives"),
    ],
)
def test_what_is_refused(variables: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        doodl_fast.optimize(tiny_chain(), START, None, loss, 1, variables=variables, progress=False)


def test_variables_that_a_chain_does_not_have() -> None:
    for other, text in ((tiny_chain(guidance_scale=1.0), "without it"), (lambda x, y: (x, y), "of a Denoiser")):
        with pytest.raises(ValueError, match=rf"variables\['guidance_scale'\]: expected a chain .*{text}"):
            doodl_fast.optimize(other, START, None, loss, 1, variables="guidance_scale", progress=False)


def test_a_variable_that_the_loss_does_not_depend_on_is_named() -> None:
    def elsewhere(start: Tensor) -> Tensor:
        return start.square().sum()

    with pytest.raises(ValueError, match=r"variables\['prompt_embeds'\]: the loss does not depend on it in a way"):
        doodl_fast.optimize(
            tiny_chain(), START, None, elsewhere, 1, variables=["start", "prompt_embeds"], progress=False
        )


def test_values_that_are_not_finite_name_their_variable() -> None:
    variables = {"prompt_embeds": {"optimizer": torch.optim.SGD, "lr": float("inf")}}
    with pytest.raises(FloatingPointError, match=r"variables\['prompt_embeds'\]: the updated values hold NaN or Inf"):
        doodl_fast.optimize(tiny_chain(), START, None, loss, 2, variables=variables, progress=False)
