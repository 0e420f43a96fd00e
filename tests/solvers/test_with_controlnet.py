"""With ControlNets a chain has the pipeline's own latents, and the gradient of naive autograd also for the picture."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from conftest import relative
from tiny_extras import (
    assert_same_gradients,
    chain_and_pipeline,
    controlnet,
    picture,
    pipelines,
    unet_like,
    with_parts,
)
from tolerances import FP32

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import DPMSolver, Sampler

KINDS = {"sd": "StableDiffusionControlNetPipeline", "xl": "StableDiffusionXLControlNetPipeline"}
SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = pipelines(tmp_path_factory.mktemp("pipes"))
    return {kind: with_parts(KINDS[kind], pipe, controlnet=controlnet(pipe.unet)) for kind, pipe in made.items()}


@pytest.fixture(scope="module")
def several(pipes: dict[str, Any]) -> Any:
    pipe = pipes["sd"]
    nets = diffusers.MultiControlNetModel([pipe.controlnet, controlnet(pipe.unet, seed=1)])
    return with_parts(KINDS["sd"], pipe, controlnet=nets)


OPTIONS: dict[str, dict[str, Any]] = {
    "guided": {"guidance_scale": 3.0, "negative_prompt": "ugly", "controlnet_conditioning_scale": 0.7},
    "alone": {"guidance_scale": 1.0},
    "guess": {"guidance_scale": 3.0, "guess_mode": True},
    "part": {"guidance_scale": 3.0, "control_guidance_start": 0.2, "control_guidance_end": 0.8},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_latents(pipes: dict[str, Any], kind: str, options: str) -> None:
    got, expected = chain_and_pipeline(pipes[kind], {"image": picture(), **SIZE, **OPTIONS[options]})
    assert relative(got, expected) < FP32
    other, _ = chain_and_pipeline(pipes[kind], {"image": picture(seed=1), **SIZE, **OPTIONS[options]})
    assert relative(other, expected) > 1e-3, "the picture must matter"
    if options != "guided":
        plain = {"image": picture(), **SIZE, "guidance_scale": OPTIONS[options]["guidance_scale"]}
        assert options == "alone" or relative(chain_and_pipeline(pipes[kind], plain)[0], expected) > 1e-3


@pytest.mark.parametrize("solver", [Sampler, DPMSolver])
def test_part_of_the_steps_with_the_schedulers_own(pipes: dict[str, Any], solver: Any) -> None:
    pipe = pipes["sd"]
    options = {"image": picture(), **SIZE, **OPTIONS["part"]}
    if solver is DPMSolver:
        made = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe = with_parts(KINDS["sd"], pipe, scheduler=made)
    got, expected = chain_and_pipeline(pipe, options, solver=solver)
    assert relative(got, expected) < FP32


def test_several_controlnets_and_a_batch_of_two(several: Any) -> None:
    options = {
        "prompt": ["a dog", "a cat"],
        "image": [picture(2), picture(2, seed=1)],
        "controlnet_conditioning_scale": [0.5, 0.9],
        "control_guidance_start": [0.0, 0.5],
        "guidance_scale": 3.0,
    }
    got, expected = chain_and_pipeline(several, options, batch=2)
    assert got.shape == (2, 4, 8, 8), "the size is that of the pictures"
    assert relative(got, expected) < FP32
    swapped = {**options, "image": [picture(2, seed=1), picture(2)]}
    assert relative(chain_and_pipeline(several, swapped, batch=2)[0], expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_plain_autograd(pipes: dict[str, Any], kind: str) -> None:
    def make(solver: Any) -> Any:
        def chain(memory: Any, hint: Any) -> Any:
            return solver.from_pipeline(
                pipes[kind], "a dog", num_inference_steps=3, guidance_scale=3.0, memory=memory, image=hint,
                control_guidance_end=0.7,
            )  # fmt: skip

        return chain

    x = make(DDIM)("checkpoint", picture()).noise(seed=1)
    assert_same_gradients(make(DDIM), [picture()], ["checkpoint", "auto"], x)
    assert_same_gradients(make(EDICT), [picture()], ["reversible"], x)


def test_it_is_undone_and_the_pipeline_is_left_alone(pipes: dict[str, Any]) -> None:
    pipe = pipes["sd"]
    chain = EDICT.from_pipeline(pipe, "a dog", num_inference_steps=2, image=picture(), state_dtype=torch.float64)
    x = chain.noise(seed=1)
    with torch.no_grad():
        back = chain.inverse(*chain(x))
    assert all(relative(found, x) < FP32 for found in back)
    assert pipe.unet is chain.denoiser.unet.unet and "controlnet" not in dict(pipe.unet.named_children())


def test_what_does_not_fit_is_refused(pipes: dict[str, Any], several: Any) -> None:
    pipe = pipes["sd"]

    def refused(kind: type[Exception], match: str, pipe: Any = pipe, solver: Any = DDIM, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            solver.from_pipeline(pipe, "a dog", num_inference_steps=4, **options)

    refused(TypeError, r"^image: expected the picture that the ControlNet reads, got None")
    refused(ValueError, r"^image: expected a list of 2 pictures, one for each ControlNet, got Tensor", several,
            image=picture())  # fmt: skip
    refused(ValueError, r"^controlnet_conditioning_scale: expected a number, or a list of 1, .* got \[1, 2\]",
            image=picture(), controlnet_conditioning_scale=[1, 2])  # fmt: skip
    refused(ValueError, r"^control_guidance_start, control_guidance_end: expected 0 <= start < end <= 1, .* 0.5 and 0",
            image=picture(), control_guidance_start=0.5, control_guidance_end=0.5)  # fmt: skip
    refused(ValueError, r"^image: expected a tensor \(1 or B, 3, 128, 64\) in \[0, 1\] because it requires grad",
            image=picture().requires_grad_(), height=128)  # fmt: skip
    heun = with_parts(KINDS["sd"], pipe, scheduler=diffusers.HeunDiscreteScheduler())
    refused(ValueError, r"^control_guidance_start, control_guidance_end: expected a scheduler that has each timestep",
            heun, Sampler, image=picture(), control_guidance_end=0.5)  # fmt: skip
    refused(TypeError, r"^control_image: from_pipeline has no such argument", image=picture(), control_image=picture())


def test_other_control_networks_and_pipelines_are_refused(pipes: dict[str, Any]) -> None:
    pipe = pipes["sd"]

    class Union(diffusers.ControlNetModel):
        pass

    config = {name: value for name, value in pipe.controlnet.config.items() if not name.startswith("_")}
    other = with_parts(KINDS["sd"], pipe, controlnet=Union(**config))
    with pytest.raises(ValueError, match=r"^controlnet: expected a ControlNetModel or a MultiControlNetModel, got Uni"):
        DDIM.from_pipeline(other, "a dog", image=picture())
    inpaint = with_parts("StableDiffusionControlNetPAGPipeline", pipe)
    with pytest.raises(ValueError, match=r"^pipe: StableDiffusionControlNetPAGPipeline has controlnet, which .* ig"):
        DDIM.from_pipeline(inpaint, "a dog", image=picture())
    assert unet_like(pipe).config.in_channels == 4
