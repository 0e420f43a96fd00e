"""Few-step chains (1 to 8 steps: Turbo, Lightning, LCM, TCD, schnell) against the pipelines and plain autograd.

Their networks are distilled; what makes them run in few steps is the scheduler that each of them is published with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import tiny_pipeline
import torch
from conftest import relative
from tolerances import FP32

import doodl_fast
from doodl_fast.diffusion.families.flux import pack
from doodl_fast.solvers.sampler import LCM, Sampler

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Lightning": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}
KINDS = [*SCHEDULERS, "schnell"]
STEPS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work: Path = tmp_path_factory.mktemp("few")
    made = {"schnell": tiny_families.flux(work, guidance_embeds=False)}
    for kind, (name, options) in SCHEDULERS.items():
        made[kind] = tiny_pipeline.stable_diffusion(work)
        made[kind].scheduler = getattr(diffusers, name).from_config(made[kind].scheduler.config, **options)
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def options_of(kind: str, steps: int) -> dict[str, Any]:
    """Such networks are called without guidance, and the text of FLUX is kept short."""
    own = {"max_sequence_length": 8} if kind == "schnell" else {"guidance_scale": 0.0}
    return {"num_inference_steps": steps, **own, **({"eta": 0.3} if kind == "TCD" else {})}


def chain_of(pipes: dict[str, Any], kind: str, steps: int, memory: str = "checkpoint") -> Sampler:
    solver = LCM if kind == "LCM" else Sampler
    return solver.from_pipeline(pipes[kind], "a dog", memory=memory, **options_of(kind, steps))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_pipelines(pipes: dict[str, Any], kind: str, steps: int) -> None:
    chain, pipe = chain_of(pipes, kind, steps), pipes[kind]
    x = chain.noise(seed=3)
    given = {"latents": pack(x) if kind == "schnell" else x, "generator": torch.Generator().manual_seed(11)}
    if kind == "schnell":
        given |= {"height": 16, "width": 16}
    expected = pipe("a dog", output_type="latent", **given, **options_of(kind, steps)).images
    noise = chain.draw_noise(x, generator=torch.Generator().manual_seed(11))
    assert chain.num_network_calls == steps
    assert len(noise) == (0 if kind in ("Lightning", "schnell") else steps - 1)  # The last step adds none.
    (found,) = chain(x, noise)
    found = pack(found) if kind == "schnell" else found
    assert found.shape == expected.shape
    assert relative(found, expected) < FP32 < relative(given["latents"], expected)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_input_has_the_gradient_of_plain_autograd(pipes: dict[str, Any], kind: str, steps: int) -> None:
    gradients = []
    for memory in ("naive", "checkpoint"):
        chain = chain_of(pipes, kind, steps, memory)
        x = chain.noise(seed=3).requires_grad_()
        noise = [z.requires_grad_() for z in chain.draw_noise(x.detach(), seed=5)]
        loss = chain.decode(chain(x, noise)[0]).square().mean()
        gradients.append(torch.autograd.grad(loss, [x, *noise]))
    assert len(gradients[0]) == 1 + chain.num_draws
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < FP32


@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "TCDScheduler"])
def test_eta_is_the_pipelines(pipes: dict[str, Any], scheduler: str, eta: float | None) -> None:
    """Its default too: pipelines give their schedulers 0, whatever the scheduler's own default is."""
    pipe = diffusers.StableDiffusionPipeline(**pipes["Turbo"].components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    options: dict[str, Any] = {"num_inference_steps": 4, **({} if eta is None else {"eta": eta})}
    chain = Sampler.from_pipeline(pipe, "a dog", memory="checkpoint", **options)
    x = chain.noise(seed=3)
    generator = torch.Generator().manual_seed(11)
    expected = pipe("a dog", latents=x, generator=generator, output_type="latent", **options).images
    noise = chain.draw_noise(x, generator=torch.Generator().manual_seed(11))
    assert bool(noise) == bool(eta)
    assert relative(chain(x, noise)[0], expected) < FP32


def test_eta_that_would_be_ignored_is_refused(pipes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^eta: expected 0 with LCMScheduler, whose steps have no eta, got 0\.5"):
        LCM.from_pipeline(pipes["LCM"], "a dog", num_inference_steps=4, eta=0.5)


@pytest.mark.parametrize("kind", ["Turbo", "schnell"])
def test_one_step_is_optimised_with_one_call_and_one_more_for_the_gradient(pipes: dict[str, Any], kind: str) -> None:
    """As ReNO (arXiv 2406.04312) does with one-step networks."""
    chain = chain_of(pipes, kind, 1)
    x = chain.noise(seed=1)
    target = chain.decode(chain(chain.noise(seed=2))[0]).detach()
    result = doodl_fast.optimize(
        chain, x, chain.decode, lambda image: (image - target).square().mean(), 4, clip_grad_value=None,
        grad_scale=50, perturbation_scale=0.0, progress=False,
    )  # fmt: skip
    assert result.best_loss < 0.95 * result.losses[0], result.losses
