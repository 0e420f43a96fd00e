"""Inpainting chains have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from conftest import relative, sd_scheduler
from tiny_extras import STEPS, assert_same_gradients, controlnet, picture, pipelines, sure_vae, unet_like, with_parts
from tolerances import FP32
from torch import Tensor

from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

KINDS = {"sd": "StableDiffusionInpaintPipeline", "xl": "StableDiffusionXLInpaintPipeline"}
SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By the kind and the channels of the UNet."""
    made = {}
    for kind, pipe in pipelines(tmp_path_factory.mktemp("pipes")).items():
        made[f"{kind} 4"] = with_parts(KINDS[kind], pipe, vae=sure_vae())
        made[f"{kind} 9"] = with_parts(
            KINDS[kind], pipe, unet=unet_like(pipe, in_channels=9).requires_grad_(False), vae=sure_vae()
        )
    return made


def mask() -> Tensor:
    drawn = torch.zeros(1, 1, 64, 64)
    drawn[..., 8:40, 16:56] = 1
    return drawn


def compare(pipe: Any, options: dict[str, Any], solver: Any = DDIM, seed: int = 3) -> tuple[Any, Tensor, Tensor]:
    """A chain, its end, and the pipeline's latents with a generator of the seed of the chain's noise."""
    given = {**SIZE, "num_inference_steps": STEPS, "guidance_scale": 3.0, **options}
    chain = solver.from_pipeline(pipe, "a dog", memory="checkpoint", **given)
    x = chain.noise(seed=seed)
    with torch.no_grad():
        (x0,) = chain(x)
    asked = {**given, "generator": torch.Generator().manual_seed(seed)}
    expected = pipe("a dog", **asked, output_type="latent").images
    assert relative(x, expected) > 0.1
    return chain, x0, expected


@pytest.mark.parametrize("kind", ["sd 9", "xl 9"])
@pytest.mark.parametrize(("strength", "guidance_scale"), [(1.0, 3.0), (0.6, 3.0), (1.0, 1.0)])
def test_a_unet_that_sees_the_mask(pipes: dict[str, Any], kind: str, strength: float, guidance_scale: float) -> None:
    options = {"image": picture(), "mask_image": mask(), "strength": strength, "guidance_scale": guidance_scale}
    _, x0, expected = compare(pipes[kind], options)
    assert relative(x0, expected) < FP32
    assert relative(compare(pipes[kind], {**options, "image": picture(seed=1)})[1], expected) > 1e-3
    assert relative(compare(pipes[kind], {**options, "mask_image": 1 - mask()})[1], expected) > 1e-3


SCHEDULERS: dict[str, Any] = {
    "eps": {},
    "v": {"prediction_type": "v_prediction", "set_alpha_to_one": True},
    "sample": {"prediction_type": "sample"},
}


@pytest.mark.parametrize("kind", ["sd 4", "xl 4"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("solver", [DDIM, Sampler])
def test_a_unet_that_does_not_see_the_mask(pipes: dict[str, Any], kind: str, name: str, solver: Any) -> None:
    """Pictures are compared: after its last step the pipeline puts in the known part, which here the decoder does."""
    pipe = with_parts(KINDS[kind[:2]], pipes[kind], scheduler=sd_scheduler(steps_offset=1, **SCHEDULERS[name]))
    options = {"image": picture(), "mask_image": mask(), "strength": 0.8}
    chain, x0, expected = compare(pipe, options, solver)
    small = mask()[..., ::8, ::8]
    assert relative(x0 * small, expected * small) < FP32, "the part that is made anew"
    with torch.no_grad():
        pictures = [(decoded + 1) / 2 for decoded in (chain.decode(x0), chain.decode.leaner().leaner()(x0))]
    asked = {**SIZE, "num_inference_steps": STEPS, "guidance_scale": 3.0, **options}
    generator = torch.Generator().manual_seed(3)
    image = pipe("a dog", **asked, generator=generator, output_type="pt").images
    for decoded in pictures:
        assert relative(decoded.clamp(0, 1), image) < FP32
    text, _, _ = compare(with_parts("StableDiffusionPipeline", pipe), {}) if kind == "sd 4" else (None, 0, 0)
    assert text is None or relative(text(text.noise(seed=3))[0] * small, expected * small) > 1e-3


@pytest.mark.parametrize("kind", ["sd 4", "sd 9", "xl 4"])
def test_with_a_controlnet(pipes: dict[str, Any], kind: str) -> None:
    name = {"sd": "StableDiffusionControlNetInpaintPipeline", "xl": "StableDiffusionXLControlNetInpaintPipeline"}
    plain = unet_like(pipes[kind], in_channels=4)
    scheduler = sd_scheduler(steps_offset=1, set_alpha_to_one=True)
    pipe = with_parts(name[kind[:2]], pipes[kind], controlnet=controlnet(plain), scheduler=scheduler)
    options = {"image": picture(), "mask_image": mask(), "control_image": picture(seed=2), "strength": 0.8}
    _, x0, expected = compare(pipe, options)
    assert relative(x0, expected) < FP32
    assert relative(compare(pipe, {**options, "control_image": picture(seed=3)})[1], expected) > 1e-3


def test_the_schedulers_own_second_order_steps(pipes: dict[str, Any]) -> None:
    made = diffusers.DPMSolverMultistepScheduler.from_config(pipes["sd 4"].scheduler.config)
    pipe = with_parts(KINDS["sd"], pipes["sd 9"], scheduler=made)
    _, x0, expected = compare(pipe, {"image": picture(), "mask_image": mask(), "strength": 0.6}, Sampler)
    assert relative(x0, expected) < FP32


def test_pure_noise_is_a_level_of_zero_snr(pipes: dict[str, Any]) -> None:
    zero = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    pipe = with_parts(KINDS["sd"], pipes["sd 4"], scheduler=sd_scheduler(set_alpha_to_one=True, **zero))
    _, x0, expected = compare(pipe, {"image": picture(), "mask_image": mask(), "strength": 1.0})
    assert relative(x0, expected) < FP32, "all of the latents, because the last step leads to the picture itself"


def test_latents_in_place_of_pictures(pipes: dict[str, Any]) -> None:
    chain = DDIM.from_pipeline(pipes["sd 9"], "a dog", image=picture(), mask_image=mask(), **SIZE)
    encode, pixels = chain.decode.encode, picture() * 2 - 1
    options = {"mask_image": mask(), "strength": 0.6}
    latents = {"image": encode(pixels), "masked_image_latents": encode(pixels * (mask() < 0.5))}
    by_pixels = compare(pipes["sd 9"], {"image": picture(), **options})[1]
    assert relative(compare(pipes["sd 9"], {**latents, **options})[1], by_pixels) > 1e-3, "the noise is another draw"
    _, x0, expected = compare(pipes["sd 9"], {**latents, **options})
    assert relative(x0, expected) < FP32


@pytest.mark.parametrize("kind", ["sd 4", "sd 9", "xl 9"])
def test_gradient_is_that_of_plain_autograd(pipes: dict[str, Any], kind: str) -> None:
    embeds = pipes[kind].encode_prompt("a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, embeds, strict=False))

    def make(solver: Any) -> Any:
        return lambda memory, leaf: solver.from_pipeline(
            pipes[kind], num_inference_steps=4, guidance_scale=3.0, memory=memory, image=picture(), mask_image=mask(),
            strength=0.8, **SIZE, **{**given, "prompt_embeds": leaf},
        )  # fmt: skip

    x = make(DDIM)("checkpoint", given["prompt_embeds"]).noise(seed=1)
    assert_same_gradients(make(DDIM), [given["prompt_embeds"]], ["checkpoint", "auto"], x)
    assert_same_gradients(make(EDICT), [given["prompt_embeds"]], ["reversible"], x)


def test_what_does_not_fit_is_refused(pipes: dict[str, Any]) -> None:
    def refused(match: str, kind: str, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            DDIM.from_pipeline(pipes[kind], "a dog", num_inference_steps=4, **{**SIZE, **options})

    given = {"image": picture(), "mask_image": mask()}
    refused(r"^image: expected a picture, because StableDiffusionInpaintPipeline paints in", "sd 9", TypeError)
    refused(r"^mask_image: expected a picture, because", "sd 4", TypeError, image=picture(), strength=0.5)
    refused(
        r"^strength: expected a number below 1, .* got 1: the pipeline then starts from noise alone", "sd 4", **given
    )
    refused(
        r"^padding_mask_crop: expected None, because from_pipeline makes no crop", "sd 9", padding_mask_crop=8, **given
    )
    refused(r"^denoising_start: expected None with a mask, got 0.5", "xl 9", denoising_start=0.5, **given)
    refused(r"^masked_image_latents: expected a tensor because image holds latents, got None", "sd 9", TypeError,
            image=torch.zeros(1, 4, 8, 8), mask_image=mask())  # fmt: skip
    euler = diffusers.EulerDiscreteScheduler.from_config(pipes["sd 4"].scheduler.config, timestep_spacing="linspace")
    pipe = with_parts(KINDS["sd"], pipes["sd 4"], scheduler=euler)
    with pytest.raises(ValueError, match=r"^mask_image: expected a scheduler with whole timesteps, .* such as"):
        Sampler.from_pipeline(pipe, "a dog", num_inference_steps=7, strength=0.8, **SIZE, **given)
