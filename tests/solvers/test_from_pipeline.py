"""A chain made of a diffusers pipeline has the pipeline's own prompts, noise and decoder, and ignores nothing."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipeline
import torch
from conftest import relative
from diffusers.utils.torch_utils import randn_tensor
from tolerances import FP32
from torch import Tensor

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline.stable_diffusion(tmp_path_factory.mktemp("sd"))


def with_parts(kind: str, pipe: Any, **changes: Any) -> Any:
    """A pipeline of another class from the parts of `pipe`."""
    make = getattr(diffusers, kind)
    parts = {**pipe.components, "requires_safety_checker": False, **changes}
    return make(**{name: part for name, part in parts.items() if name in inspect.signature(make).parameters})


def unet_with(pipe: Any, **changes: Any) -> Any:
    """A UNet of the pipeline's configuration but for the changes, with other weights."""
    torch.manual_seed(0)
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    return diffusers.UNet2DConditionModel(**{**config, **changes}).eval()


# Prompts


def test_prompts_are_the_pipelines_own(pipe: Any) -> None:
    chain = EDICT.from_pipeline(pipe, "a dog", "ugly", 4, 3.0)
    cond, uncond = pipe.encode_prompt("a dog", "cpu", 1, True, "ugly")
    assert torch.equal(chain.denoiser.cond, cond) and torch.equal(chain.denoiser.uncond, uncond)
    assert chain.denoiser.guidance_scale == 3.0 and chain.denoiser.unet is pipe.unet
    assert chain.schedule == Schedule.from_scheduler(pipe.scheduler, 4)
    assert chain.memory == "auto" and chain.mix_weight == 0.93


def test_further_arguments_of_encode_prompt_reach_it(xl: Any) -> None:
    chain = EDICT.from_pipeline(xl, "a dog", num_inference_steps=4, prompt_2="a cat")
    cond, _, pooled, _ = xl.encode_prompt("a dog", prompt_2="a cat", device="cpu")
    assert torch.equal(chain.denoiser.cond, cond)
    assert torch.equal(chain.denoiser.unet_kwargs["added_cond_kwargs"]["text_embeds"].cond, pooled)
    assert not torch.equal(cond, xl.encode_prompt("a dog", device="cpu")[0])


def test_without_guidance_the_prompt_alone_is_used_and_a_negative_prompt_is_said_to_be_ignored(pipe: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain = EDICT.from_pipeline(pipe, "a dog", num_inference_steps=4, guidance_scale=0.0)
    assert chain.denoiser.uncond is None and not chain.denoiser.guided
    x = chain.noise()
    with torch.no_grad():
        expected = pipe.unet(x, 500, encoder_hidden_states=chain.denoiser.cond).sample
    assert relative(chain.denoiser(x, 500), expected) < 1e-6
    with pytest.warns(RuntimeWarning, match=r"negative_prompt: it is not used with guidance_scale=1; guidance needs"):
        EDICT.from_pipeline(pipe, "a dog", "ugly", num_inference_steps=4, guidance_scale=1)


def test_embeddings_that_are_given_get_gradients(pipe: Any, xl: Any) -> None:
    cond, uncond = pipe.encode_prompt("a dog", "cpu", 1, True)
    leaf = cond.clone().requires_grad_()
    chain = EDICT.from_pipeline(pipe, prompt_embeds=leaf, negative_prompt_embeds=uncond, num_inference_steps=2)
    (gradient,) = torch.autograd.grad(chain(chain.noise())[0].sum(), leaf)
    assert gradient.norm() > 0
    assert torch.equal(chain.denoiser.uncond, uncond)
    by_prompt = EDICT.from_pipeline(pipe, "a dog", num_inference_steps=2)
    assert torch.equal(chain(chain.noise())[0].detach(), by_prompt(chain.noise())[0])
    with pytest.raises(ValueError, match="prompt: expected None because prompt_embeds is given, got 'a dog'"):
        EDICT.from_pipeline(pipe, "a dog", prompt_embeds=cond)
    with pytest.raises(TypeError, match="prompt: expected a string or a list of strings, got None"):
        EDICT.from_pipeline(pipe)
    embedded = xl.encode_prompt("a dog", negative_prompt="ugly", device="cpu")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = EDICT.from_pipeline(xl, num_inference_steps=2, **dict(zip(names, embedded, strict=True)))
    same = EDICT.from_pipeline(xl, "a dog", "ugly", num_inference_steps=2)
    assert torch.equal(given(given.noise())[0], same(same.noise())[0])


def test_several_prompts_are_a_batch(pipe: Any) -> None:
    chain = EDICT.from_pipeline(pipe, ["a dog", "a cat"], num_inference_steps=2)
    x = chain.noise(seed=1)
    assert x.shape[0] == 2
    single = EDICT.from_pipeline(pipe, "a cat", num_inference_steps=2)
    assert relative(chain(x)[0][1:], single(x[1:])[0]) < FP32
    with pytest.raises(ValueError, match="batch: expected 2, one for each prompt of the chain, got 3"):
        chain.noise(batch=3)


def test_a_saved_pipeline_is_loaded(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    chain = EDICT.from_pretrained(tmp_path, "a dog", num_inference_steps=2, mix_weight=0.8, dtype=torch.bfloat16)
    assert chain.denoiser.unet.dtype == torch.bfloat16 and chain.mix_weight == 0.8
    with pytest.raises(ValueError, match=r"model: the folder .* does not exist"):
        EDICT.from_pretrained(tmp_path / "none", "a dog")


# Noise and decoder


@pytest.mark.parametrize("kind", ["pipe", "xl"])
def test_noise_is_the_pipelines_with_ddim(kind: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(kind)
    chain = EDICT.from_pipeline(pipe, "a dog", num_inference_steps=2)
    size = pipe.unet.config.sample_size * 8
    expected = pipe.prepare_latents(3, 4, size, size, torch.float32, "cpu", torch.Generator().manual_seed(5))
    assert torch.equal(chain.noise(5, 3), expected)
    assert torch.equal(chain.noise(batch=3, generator=torch.Generator().manual_seed(5)), expected)
    assert torch.equal(chain.noise(seed=5, batch=3, dtype=torch.float16), expected.half())
    assert chain.noise(device="meta").device.type == "meta"


def test_noise_has_unit_variance_whatever_the_scheduler(pipe: Any) -> None:
    """Euler's own latents are scaled by its init_noise_sigma; those of the chain are DDIM's."""
    other = with_parts("StableDiffusionPipeline", pipe)
    other.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = EDICT.from_pipeline(other, "a dog", num_inference_steps=2)
    assert float(other.scheduler.init_noise_sigma) > 10
    expected = randn_tensor((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(chain.noise(), expected)


def test_sizes_are_those_of_the_chain(pipe: Any, xl: Any) -> None:
    chain = EDICT.from_pipeline(pipe, "a dog", num_inference_steps=2, height=64, width=128)
    assert chain.noise().shape == (1, 4, 8, 16) and chain.noise(height=128).shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match=r"height: expected a positive multiple of 8 .* got 100; the nearest is 96"):
        EDICT.from_pipeline(pipe, "a dog", height=100)
    with pytest.raises(ValueError, match=r"width: expected a positive multiple of 8"):
        chain.noise(width=12)
    sized = EDICT.from_pipeline(xl, "a dog", num_inference_steps=2, height=64)
    assert sized.noise().shape == (1, 4, 8, 16)
    assert sized.denoiser.unet_kwargs["added_cond_kwargs"]["time_ids"][0].tolist() == [64, 128, 0, 0, 64, 128]
    with pytest.raises(ValueError, match=r"height: expected 64, the size that this chain's conditions .* got 128"):
        sized.noise(height=128)


def test_decoding_is_the_pipelines(pipe: Any) -> None:
    chain = EDICT.from_pipeline(pipe, "a dog", num_inference_steps=2)
    latents = chain.noise(batch=2) * 0.3
    with torch.no_grad():
        raw = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    expected = pipe.image_processor.postprocess(raw, output_type="pt", do_denormalize=[True] * 2)
    assert relative(((chain.decode(latents) + 1) / 2).clamp(0, 1), expected) < FP32


def test_a_chain_made_by_hand_says_what_it_does_not_know(pipe: Any) -> None:
    cond, uncond = pipe.encode_prompt("a dog", "cpu", 1, True)
    chain = EDICT(Denoiser(pipe.unet, cond, uncond), Schedule.from_scheduler(pipe.scheduler, 2))
    with pytest.raises(ValueError, match=r"noise: this chain was not made by from_pipeline.*use torch.randn"):
        chain.noise()
    with pytest.raises(AttributeError, match=r"decode: this chain was not made by from_pipeline.*Decoder"):
        chain.decode  # noqa: B018
    assert chain.denoiser is chain.evaluator


# SDXL, and what else the UNet takes


def halves(xl: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The XL UNet's unconditional and conditional predictions for "a dog", "ugly", each from a call of its own."""
    embedded = xl.encode_prompt("a dog", negative_prompt="ugly", device="cpu")
    time_ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(len(x), -1)
    found = []
    for states, pooled in ((embedded[1], embedded[3]), (embedded[0], embedded[2])):
        added = {"text_embeds": pooled.expand(len(x), -1), "time_ids": time_ids}
        with torch.no_grad():
            states = states.expand(len(x), -1, -1)
            found.append(xl.unet(x, 500, encoder_hidden_states=states, added_cond_kwargs=added).sample)
    return found[0], found[1]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_one_sdxl_chain_serves_any_batch(xl: Any, batch: int) -> None:
    chain = EDICT.from_pipeline(xl, "a dog", "ugly", num_inference_steps=2, guidance_scale=3.0)
    x = chain.noise(batch=batch)
    eps_uncond, eps_cond = halves(xl, x)
    assert relative(eps_cond, eps_uncond) > 1e-2
    assert relative(chain.denoiser(x, 500), eps_uncond + 3 * (eps_cond - eps_uncond)) < FP32
    alone = EDICT.from_pipeline(xl, "a dog", num_inference_steps=2, guidance_scale=1.0)
    assert relative(alone.denoiser(x, 500), eps_cond) < FP32


def test_options_reach_the_solver_the_denoiser_and_the_network(pipe: Any) -> None:
    chain = EDICT.from_pipeline(
        pipe, "a dog", num_inference_steps=2, mix_weight=0.8, arithmetic="exact", memory="reversible",
        drift_tolerance=0.5, vjp_dtype=torch.float64, cross_attention_kwargs={}, timestep_cond=None,
    )  # fmt: skip
    assert (chain.mix_weight, chain.arithmetic, chain.memory) == (0.8, "exact", "reversible")
    assert chain.denoiser.vjp_dtype == torch.float64
    assert chain.denoiser.unet_kwargs == {"cross_attention_kwargs": {}, "timestep_cond": None}
    chain = EDICT.from_pipeline(pipe, "a dog", num_inference_steps=2, memory_budget="1GiB")
    assert chain.memory_budget == 2**30


@pytest.mark.parametrize("name", ["eta", "image", "latents", "num_images_per_prompt", "ip_adapter"])
def test_unknown_options_are_refused(pipe: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: from_pipeline has no such argument"):
        EDICT.from_pipeline(pipe, "a dog", num_inference_steps=2, **{name: 1})


def test_a_network_that_embeds_the_guidance_scale_gets_it(pipe: Any) -> None:
    """As the pipeline does for consistency models: no second evaluation, the scale as an input."""
    unet = unet_with(pipe, time_cond_proj_dim=8)
    other = with_parts("StableDiffusionPipeline", pipe, unet=unet)
    chain = EDICT.from_pipeline(other, "a dog", num_inference_steps=2, guidance_scale=4.0)
    x = chain.noise(batch=2)
    embedded = other.get_guidance_scale_embedding(torch.tensor([3.0, 3.0]), embedding_dim=8)
    with torch.no_grad():
        states = chain.denoiser.cond.expand(2, -1, -1)
        expected = unet(x, 500, encoder_hidden_states=states, timestep_cond=embedded).sample
        without = unet(x, 500, encoder_hidden_states=states).sample
    assert relative(chain.denoiser(x, 500), expected) < FP32 < relative(without, expected)


# What is refused


def test_components_that_would_be_ignored_are_named(pipe: Any) -> None:
    control = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    controlled = with_parts("StableDiffusionControlNetPAGPipeline", pipe, controlnet=control)
    with pytest.raises(ValueError, match=r"pipe: StableDiffusionControlNetPAG\w+ has controlnet, which .* ignore"):
        EDICT.from_pipeline(controlled, "a dog")


def test_unets_that_take_more_than_latents_are_refused(pipe: Any) -> None:
    unet = unet_with(pipe, in_channels=9)
    with pytest.raises(ValueError, match=r"pipe: expected a UNet of 4 input channels .* got 9: inpainting"):
        EDICT.from_pipeline(with_parts("StableDiffusionPipeline", pipe, unet=unet), "a dog")


def test_other_video_pipelines_are_refused(pipe: Any) -> None:
    motion = diffusers.MotionAdapter(
        block_out_channels=pipe.unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    animated = with_parts("AnimateDiffVideoToVideoPipeline", pipe, motion_adapter=motion)
    with pytest.raises(ValueError, match="pipe: AnimateDiffVideoToVideoPipeline makes videos, and from_pipeline does"):
        EDICT.from_pipeline(animated, "a dog")


def test_pipelines_without_the_parts_are_refused(pipe: Any) -> None:
    unconditional = diffusers.DDPMPipeline(pipe.unet, pipe.scheduler)
    with pytest.raises(TypeError, match=r"got DDPMPipeline without vae, text_encoder; make the chain by hand"):
        EDICT.from_pipeline(unconditional, "a dog")
    with pytest.raises(TypeError, match="got str without unet, vae, scheduler, text_encoder"):
        EDICT.from_pipeline("stable-diffusion", "a dog")  # type: ignore[arg-type]


def test_flow_matching_is_refused(pipe: Any) -> None:
    flow = with_parts("StableDiffusionPipeline", pipe)
    flow.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TypeError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod; flow-matching"):
        EDICT.from_pipeline(flow, "a dog")


def test_a_refiner_is_refused(xl: Any) -> None:
    parts = {**xl.components, "text_encoder": None, "tokenizer": None}
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    with pytest.raises(ValueError, match=r"is a refiner \(requires_aesthetics_score\)"):
        EDICT.from_pipeline(refiner, "a dog")


def test_an_ip_adapter_needs_its_embeddings(pipe: Any) -> None:
    unet = unet_with(pipe)
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    other = with_parts("StableDiffusionPipeline", pipe, unet=unet)
    with pytest.raises(ValueError, match=r"^ip_adapter_image: the pipeline's UNet has an IP-Adapter, so expected"):
        EDICT.from_pipeline(other, "a dog", num_inference_steps=2)
    image = torch.randn(2, 1, 16)
    given = EDICT.from_pipeline(other, "a dog", num_inference_steps=2, added_cond_kwargs={"image_embeds": [image]})
    assert given.denoiser.unet_kwargs["added_cond_kwargs"]["image_embeds"][0] is image


def test_an_unknown_class_with_all_parts_is_used_and_named(pipe: Any) -> None:
    class Own(diffusers.StableDiffusionPipeline):
        pass

    own = Own(**pipe.components, requires_safety_checker=False)
    with pytest.warns(RuntimeWarning, match="pipe: Own is used as a Stable Diffusion text-to-image pipeline"):
        EDICT.from_pipeline(own, "a dog", num_inference_steps=2)


def test_a_pipeline_that_cannot_encode_prompts_is_refused(pipe: Any) -> None:
    class Mute:
        components = pipe.components

    with pytest.raises(ValueError, match="pipe: Mute has no encode_prompt method"):
        EDICT.from_pipeline(Mute(), "a dog", num_inference_steps=2)


@pytest.mark.parametrize("scale", ["7", None, True])
def test_a_guidance_scale_is_a_number(pipe: Any, scale: Any) -> None:
    with pytest.raises(TypeError, match="guidance_scale: expected a number"):
        EDICT.from_pipeline(pipe, "a dog", num_inference_steps=2, guidance_scale=scale)
