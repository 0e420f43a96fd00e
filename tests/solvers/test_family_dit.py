"""Chains of DiT have the pipeline's own pictures, and the gradient of naive autograd."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_dits
import torch
from conftest import relative
from family_oracle import check_gradient

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

STEPS = 5


def pictures(pipe: Any, labels: list[int], seed: int = 3, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = pipe(labels, generator=generator, num_inference_steps=STEPS, output_type="pt", **options)
    return made.images


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize("learns_variance", [True, False])
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 1.0}, {"guidance_scale": 2.5}])
def test_pictures_are_the_pipelines(solver: Any, learns_variance: bool, guidance: dict[str, Any]) -> None:
    pipe, labels = tiny_dits.dit(learns_variance=learns_variance), [7, 640]
    chain = solver.from_pipeline(pipe, class_labels=labels, num_inference_steps=STEPS, memory="checkpoint", **guidance)
    x = chain.noise(generator=torch.Generator().manual_seed(3))
    expected = pictures(pipe, labels, **guidance)
    with torch.no_grad():
        (x0,) = chain(x)
        images = (chain.decode(x0) / 2 + 0.5).clamp(0, 1)
    assert x.shape == (2, 4, 8, 8) and relative(images, expected) < 1e-5
    assert relative(x, x0) > 0.1, "the weights must matter"
    assert relative(pictures(pipe, [8, 639], **guidance), expected) > 1e-3, "the labels must matter"


def test_the_noise_of_a_ddpm_scheduler_is_the_pipelines() -> None:
    pipe = tiny_dits.dit(diffusers.DDPMScheduler(clip_sample=False), learns_variance=False)
    chain = Sampler.from_pipeline(
        pipe, class_labels=5, num_inference_steps=STEPS, guidance_scale=1.0, memory="checkpoint"
    )
    torch.manual_seed(9)  # The pipeline gives its generator to the first noise alone.
    expected = pictures(pipe, [5], guidance_scale=1.0)
    x = chain.noise(generator=torch.Generator().manual_seed(3))
    noise = chain.draw_noise(x, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        images = (chain.decode(chain(x, noise)[0]) / 2 + 0.5).clamp(0, 1)
    assert noise and relative(images, expected) < 1e-5


@pytest.mark.parametrize(("solver", "memory"), [(DDIM, "checkpoint"), (DDIM, "auto"), (EDICT, "reversible")])
def test_gradient_is_that_of_plain_autograd(solver: Any, memory: str) -> None:
    check_gradient(solver, tiny_dits.dit(), memory, {}, {"num_inference_steps": STEPS, "class_labels": [1, 2]})


def test_what_does_not_fit_is_refused() -> None:
    pipe = tiny_dits.dit()

    def make(**options: Any) -> Any:
        return DDIM.from_pipeline(pipe, num_inference_steps=2, **options)

    with pytest.raises(ValueError, match=r"^prompt: expected None, because DiTPipeline has no text, got 'a dog'"):
        make(prompt="a dog", class_labels=1)
    with pytest.raises(TypeError, match=r"^class_labels: expected a whole number or a list of them, got None"):
        make()
    with pytest.raises(TypeError, match=r"^class_labels: expected a whole number or a list of them, got 'white shark'"):
        make(class_labels="white shark")
    with pytest.raises(ValueError, match=r"^class_labels: expected numbers from 0 to 999, got \[1, 1000\]"):
        make(class_labels=[1, 1000])
    with pytest.raises(TypeError, match=r"^eta: from_pipeline has no such argument for DiTPipeline"):
        make(class_labels=1, eta=1.0)
    with pytest.raises(ValueError, match=r"^height: expected 16, the size that DiTPipeline makes, got 32"):
        make(class_labels=1, height=32)
    with pytest.raises(ValueError, match=r"^width: expected a positive multiple of 4 .* got 15"):
        make(class_labels=1, width=15)
    with pytest.raises(TypeError, match=r"^scheduler: FlowMatchEuler.* not right for pipelines of the family DiT"):
        DDIM.from_pipeline(tiny_dits.dit(diffusers.FlowMatchEulerDiscreteScheduler()), class_labels=1)
