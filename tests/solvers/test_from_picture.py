"""Chains that start from a picture, and SDXL's refiner: the pipelines' own latents, and naive autograd's gradients."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from conftest import relative
from tiny_extras import STEPS, assert_same_gradients, controlnet, picture, pipelines, unet_like, with_parts
from tolerances import FP32

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import DPMSolver, Sampler

KINDS = {"sd": "StableDiffusionImg2ImgPipeline", "xl": "StableDiffusionXLImg2ImgPipeline"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pipelines(tmp_path_factory.mktemp("pipes"))


@pytest.fixture(scope="module")
def pipes(base: dict[str, Any]) -> dict[str, Any]:
    return {kind: with_parts(KINDS[kind], pipe) for kind, pipe in base.items()}


@pytest.fixture(scope="module")
def refiner(base: dict[str, Any]) -> Any:
    pipe = base["xl"]
    unet = unet_like(pipe, cross_attention_dim=16, projection_class_embeddings_input_dim=5 * 8 + 16)
    parts = {"unet": unet, "text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    return with_parts(KINDS["xl"], pipe, **parts)


def compare(
    pipe: Any, options: dict[str, Any], solver: Any = DDIM, seed: int = 3, batch: int | None = None
) -> tuple[Any, Any, Any]:
    """The start of a chain, its end, and what the pipeline makes with a generator of the same seed."""
    given = {name: value for name, value in options.items() if name != "prompt"}
    settings = {"num_inference_steps": STEPS, "memory": "checkpoint", **given}
    chain = solver.from_pipeline(pipe, options.get("prompt", "a dog"), **settings)
    x = chain.noise(seed=seed, batch=batch)
    asked = {"prompt": "a dog", "num_inference_steps": STEPS, **options}
    expected = pipe(**asked, generator=torch.Generator().manual_seed(seed), output_type="latent").images
    with torch.no_grad():
        (x0,) = chain(x)
    return x, x0, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("strength", "guidance_scale"), [(0.6, 3.0), (1.0, 3.0), (0.5, 1.0)])
def test_latents(pipes: dict[str, Any], kind: str, strength: float, guidance_scale: float) -> None:
    options = {"image": picture(), "strength": strength, "guidance_scale": guidance_scale}
    x, x0, expected = compare(pipes[kind], options)
    assert relative(x0, expected) < FP32 and relative(x, expected) > 0.1
    assert relative(compare(pipes[kind], {**options, "image": picture(seed=1)})[1], expected) > 1e-3


SCHEDULERS = {
    "DPM": ("DPMSolverMultistepScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler, trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_with_the_schedulers_own_steps(pipes: dict[str, Any], name: str) -> None:
    kind, changes = SCHEDULERS[name]
    made = getattr(diffusers, kind).from_config(pipes["sd"].scheduler.config, **changes)
    pipe = with_parts(KINDS["sd"], pipes["sd"], scheduler=made)
    x, x0, expected = compare(pipe, {"image": picture(), "strength": 0.6, "guidance_scale": 3.0}, Sampler)
    assert relative(x0, expected) < FP32 and relative(x, expected) > 0.1


def test_latents_in_place_of_a_picture_a_batch_and_the_default_strength(pipes: dict[str, Any]) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    options = {"prompt": ["a dog", "a cat"], "image": latents, "guidance_scale": 3.0}
    for kind, pipe in pipes.items():
        chain = DDIM.from_pipeline(pipe, options["prompt"], num_inference_steps=10, guidance_scale=3.0, image=latents)
        assert len(chain.schedule) == {"sd": 8, "xl": 3}[kind], "the pipeline's own strength"
        _, x0, expected = compare(pipe, {**options, "num_inference_steps": 10})
        assert relative(x0, expected) < FP32


def test_with_a_controlnet(base: dict[str, Any]) -> None:
    options = {"image": picture(), "control_image": picture(seed=2), "strength": 0.7, "guidance_scale": 3.0}
    options |= {"control_guidance_end": 0.6}
    for kind, xl in (("sd", ""), ("xl", "XL")):
        name = f"StableDiffusion{xl}ControlNetImg2ImgPipeline"
        pipe = with_parts(name, base[kind], controlnet=controlnet(base[kind].unet))
        _, x0, expected = compare(pipe, options)
        assert relative(x0, expected) < FP32
        assert relative(compare(pipe, {**options, "control_image": picture(seed=3)})[1], expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_picture_and_of_the_noise(pipes: dict[str, Any], kind: str) -> None:
    with torch.no_grad():
        encoded = DDIM.from_pipeline(pipes[kind], "a dog", num_inference_steps=2).decode.encode(picture() * 2 - 1)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def gradients(solver: Any, memory: Any) -> tuple[Any, ...]:
        leaves = [encoded.clone().requires_grad_(), noise.clone().requires_grad_()]
        chain = solver.from_pipeline(
            pipes[kind], "a dog", num_inference_steps=4, guidance_scale=3.0, memory=memory, image=leaves[0],
            strength=0.75,
        )  # fmt: skip
        ends = chain(chain.noised(*leaves))
        found = torch.autograd.grad(sum(end.square().mean() for end in ends), leaves)
        start = chain.noise(seed=5)
        assert torch.allclose(start, chain.noised(*leaves)) and start.requires_grad
        return found

    for solver, memories in ((DDIM, ("checkpoint", "auto")), (EDICT, ("reversible",))):
        want = gradients(solver, "naive")
        for memory in memories:
            for got, expected in zip(gradients(solver, memory), want, strict=True):
                assert expected.norm() > 0 and relative(got, expected) < FP32
    start = DDIM.from_pipeline(pipes[kind], "a dog", num_inference_steps=4, image=picture(), strength=0.5).noise()
    embeds = pipes[kind].encode_prompt("a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, embeds, strict=False))
    assert_same_gradients(
        lambda memory, leaf: DDIM.from_pipeline(
            pipes[kind], num_inference_steps=4, guidance_scale=3.0, memory=memory, image=picture(), strength=0.5,
            **{**given, "prompt_embeds": leaf},
        ),
        [given["prompt_embeds"]], ["checkpoint"], start,
    )  # fmt: skip


def test_a_picture_is_noised_and_comes_back(pipes: dict[str, Any]) -> None:
    """An edit: the chain of a part of the steps is undone from the picture, and done again."""
    chain = EDICT.from_pipeline(
        pipes["sd"], "a dog", num_inference_steps=4, image=picture(), strength=0.5, state_dtype=torch.float64
    )
    assert len(chain.schedule) == 2
    encoded = chain.decode.encode(picture() * 2 - 1).double()
    with torch.no_grad():
        again = chain(*chain.inverse(encoded, encoded))
    assert all(relative(end, encoded) < FP32 for end in again)


# SDXL's sizes, its refiner, and chains in two parts


def test_a_refiner(refiner: Any) -> None:
    options = {"image": picture(), "strength": 0.6, "guidance_scale": 3.0}
    _, x0, expected = compare(refiner, options)
    assert relative(x0, expected) < FP32
    scored = {**options, "aesthetic_score": 2.0, "negative_aesthetic_score": 9.0}
    _, x0, other = compare(refiner, scored)
    assert relative(x0, other) < FP32 and relative(other, expected) > 1e-3


@pytest.mark.parametrize("solver", [DDIM, Sampler, DPMSolver])
def test_a_base_model_and_its_refiner_are_two_parts_of_one_chain(
    base: dict[str, Any], refiner: Any, solver: Any
) -> None:
    first, second = base["xl"], refiner
    if solver is not DDIM:
        kind = {Sampler: diffusers.EulerDiscreteScheduler, DPMSolver: diffusers.DPMSolverMultistepScheduler}[solver]
        first = with_parts("StableDiffusionXLPipeline", first, scheduler=kind.from_config(first.scheduler.config))
        second = with_parts(KINDS["xl"], second, scheduler=first.scheduler, requires_aesthetics_score=True)
    options = {"num_inference_steps": 6, "guidance_scale": 3.0}
    chain = solver.from_pipeline(first, "a dog", **options, denoising_end=0.6, height=64, width=64, memory="checkpoint")
    x = chain.noise(seed=1)
    with torch.no_grad():
        (middle,) = chain(x)
    expected = first(
        "a dog", **options, latents=x, height=64, width=64, denoising_end=0.6, output_type="latent"
    ).images  # fmt: skip
    assert relative(middle, expected) < FP32
    refined = solver.from_pipeline(second, "a dog", **options, image=middle, denoising_start=0.6, memory="checkpoint")
    assert torch.equal(refined.noise(), middle), "no noise is added between the parts"
    assert len(chain.schedule) + len(refined.schedule) == 6
    with torch.no_grad():
        (x0,) = refined(refined.noise())
    expected = second("a dog", **options, image=expected, denoising_start=0.6, output_type="latent").images
    assert relative(x0, expected) < FP32


def test_the_gradient_goes_through_both_parts(base: dict[str, Any], refiner: Any) -> None:
    def ends(memory: str, x: Any) -> Any:
        options = {"num_inference_steps": 4, "guidance_scale": 3.0, "memory": memory}
        chain = DDIM.from_pipeline(base["xl"], "a dog", **options, denoising_end=0.5, height=64, width=64)
        (middle,) = chain(x)
        refined = DDIM.from_pipeline(refiner, "a dog", **options, image=middle, denoising_start=0.5)
        return refined(refined.noise())[0]

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = [torch.autograd.grad(ends(memory, x).square().mean(), x)[0] for memory in ("naive", "checkpoint")]
    assert found[0].norm() > 0 and relative(found[1], found[0]) < FP32


def test_sizes_and_crops(base: dict[str, Any], pipes: dict[str, Any]) -> None:
    sizes = {
        "original_size": (32, 48), "crops_coords_top_left": (8, 0), "negative_original_size": (16, 16),
        "negative_crops_coords_top_left": (4, 4), "negative_target_size": (128, 128), "guidance_scale": 3.0,
    }  # fmt: skip
    chain = DDIM.from_pipeline(base["xl"], "a dog", num_inference_steps=STEPS, height=64, width=64, **sizes)
    x = chain.noise(seed=3)
    options = {"num_inference_steps": STEPS, "height": 64, "width": 64, "latents": x, "output_type": "latent"}
    expected = base["xl"]("a dog", **options, **sizes).images
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < FP32
    assert relative(base["xl"]("a dog", **options, guidance_scale=3.0).images, expected) > 1e-3
    _, x0, expected = compare(pipes["xl"], {"image": picture(), "strength": 0.6, **sizes})
    assert relative(x0, expected) < FP32


def test_what_does_not_fit_is_refused(pipes: dict[str, Any], base: dict[str, Any], refiner: Any) -> None:
    def refused(match: str, pipe: Any = pipes["xl"], kind: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            DDIM.from_pipeline(pipe, "a dog", num_inference_steps=4, **options)

    refused(r"^strength: expected a number from 0 to 1, got 2", image=picture(), strength=2)
    refused(r"^strength: leaves none of the 4 steps to do", image=picture(), strength=0.1)
    refused(r"^strength: expected None without an image", strength=0.5, kind=TypeError)
    refused(r"^denoising_start: expected None without an image", denoising_start=0.5, kind=TypeError)
    refused(r"^denoising_start: expected a number between 0 and 1, got 1", image=picture(), denoising_start=1.0)
    refused(r"^denoising_start: expected less than denoising_end, 0.4, got 0.5", image=picture(), denoising_start=0.5,
            denoising_end=0.4)  # fmt: skip
    refused(r"^image: expected latents \(1 or B, 4, h, w\) because it requires grad, got \(1, 3, 64, 64\)",
            image=picture().requires_grad_())  # fmt: skip
    refused(r"is a refiner \(requires_aesthetics_score\), which starts from another model's picture", refiner)
    refused(r"^aesthetic_score: expected None, because this model is no refiner", image=picture(), aesthetic_score=6.0)
    refused(r"^original_size: expected two ints, got 64", base["xl"], original_size=64)
    refused(r"^denoising_end: from_pipeline has no such argument", base["sd"], TypeError, denoising_end=0.5)
    chain = DDIM.from_pipeline(pipes["sd"], "a dog", num_inference_steps=4, image=picture(2), strength=0.5)
    with pytest.raises(
        ValueError, match=r"^height: expected 64, the size that the picture that this chain starts from"
    ):
        chain.noise(height=128)
    with pytest.raises(ValueError, match=r"^batch: expected a multiple of 2, the number of pictures, got 3"):
        chain.noise(batch=3)
    with pytest.raises(ValueError, match=r"^seed: expected an int, of what is drawn for all pictures together, got"):
        chain.noise(seed=[1, 2])
    assert chain.noise(device="meta").shape == (2, 4, 8, 8)
