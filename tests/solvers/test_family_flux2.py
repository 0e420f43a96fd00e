"""Chains of FLUX.2 dev and klein have the pipeline's own latents and pictures, and the gradient of naive autograd."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import tiny_flows
import torch
from conftest import relative
from family_oracle import check_gradient, check_no_bit_differs, check_pictures
from torch import Tensor

from doodl_fast.diffusion.families.flux2 import empirical_shift, pack
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

ENCODING: dict[str, Any] = {"max_sequence_length": 8, "text_encoder_out_layers": (0, 1, 2)}
OPTIONS: dict[str, Any] = {**ENCODING, "num_inference_steps": 5}
SIZE = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {
        "dev": tiny_flows.flux2(),
        "klein": tiny_flows.flux2(is_klein=True),
        "distilled": tiny_flows.flux2(is_klein=True, is_distilled=True),
    }


def raw(pipe: Any) -> Any:
    """What the pipeline of klein returns as its latents: those that the VAE decodes."""
    deviation = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()

    def latents(x: Tensor) -> Tensor:
        scaled = x * deviation.reshape(1, -1, 1, 1) + pipe.vae.bn.running_mean.reshape(1, -1, 1, 1)
        return pipe._unpatchify_latents(scaled)

    return latents


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        ("dev", {}),
        ("dev", {"guidance_scale": 1.5}),
        ("klein", {}),
        ("klein", {"guidance_scale": 1.0}),
        ("distilled", {}),
    ],
)
def test_latents_and_pictures(pipes: dict[str, Any], solver: Any, kind: str, guidance: dict[str, Any]) -> None:
    pipe, options = pipes[kind], {**OPTIONS, **SIZE, **guidance}
    packed = pack if kind == "dev" else raw(pipe)
    chain = check_pictures(solver, pipe, "a dog", options, packed, given=torch.clone)
    assert chain.noise().shape == (1, 16, 4, 6)


def test_the_guidance_scale_is_an_input_of_dev(pipes: dict[str, Any]) -> None:
    chains = [DDIM.from_pipeline(pipes["dev"], "a dog", guidance_scale=scale, **OPTIONS) for scale in (1.0, 6.0)]
    x = chains[0].noise()
    assert not any(chain.denoiser.guided for chain in chains)
    with torch.no_grad():
        assert relative(chains[0](x)[0], chains[1](x)[0]) > 1e-3


def test_a_batch_of_prompts_and_the_pipelines_own_noise_and_size(pipes: dict[str, Any]) -> None:
    chain = check_pictures(Sampler, pipes["dev"], ["a dog", "a circle"], {**OPTIONS, **SIZE}, pack, given=torch.clone)
    assert len(chain.noise()) == 2
    chain = DDIM.from_pipeline(pipes["dev"], "a dog", **OPTIONS)
    generator = torch.Generator().manual_seed(5)
    drawn, _ = pipes["dev"].prepare_latents(1, 4, 16, 16, torch.float32, "cpu", generator)
    assert torch.equal(pack(chain.noise(seed=5)), drawn)


@pytest.mark.parametrize("tokens", [16, 4096, 4300, 4301, 9000])
@pytest.mark.parametrize("steps", [4, 10, 50, 200])
def test_mu_is_the_pipelines(tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    assert abs(empirical_shift(tokens, steps) - compute_empirical_mu(tokens, steps)) < 1e-9


@pytest.mark.parametrize(
    ("kind", "solver", "memory"),
    [("dev", DDIM, "checkpoint"), ("klein", Sampler, "auto"), ("klein", EDICT, "reversible")],
)
def test_gradient_is_that_of_plain_autograd(pipes: dict[str, Any], kind: str, solver: Any, memory: str) -> None:
    texts = {"prompt_embeds": "a dog", "negative_prompt_embeds": "ugly"}
    given = {name: pipes[kind].encode_prompt(text, device="cpu", **ENCODING)[0] for name, text in texts.items()}
    if kind == "dev":
        given.pop("negative_prompt_embeds")
    check_gradient(solver, pipes[kind], memory, given, {"num_inference_steps": 5})


def test_exact_arithmetic_is_undone_to_the_bit(pipes: dict[str, Any]) -> None:
    check_no_bit_differs(EDICT, pipes["dev"], "a dog", OPTIONS)


def test_pictures_are_encoded_and_decoded(pipes: dict[str, Any]) -> None:
    pipe = pipes["dev"]
    decode = DDIM.from_pipeline(pipe, "a dog", **OPTIONS).decode
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        expected = pipe._encode_vae_image(images, torch.Generator())
        assert relative(decode.encode(images), expected) < 1e-5
        assert relative(decode(expected), pipe.vae.decode(raw(pipe)(expected)).sample) < 1e-5
    with pytest.raises(ValueError, match=r"images: expected height and width in multiples of 4"):
        decode.encode(images[:, :, :14])


def test_what_has_no_effect_is_said(pipes: dict[str, Any]) -> None:
    for kind, options, message in (
        ("dev", {"negative_prompt": "ugly"}, r"^negative_prompt: it is not used by this network, which has no classi"),
        (
            "klein",
            {"negative_prompt": "ugly", "guidance_scale": 1.0},
            r"^negative_prompt: it is not used with guidance",
        ),
        ("distilled", {"guidance_scale": 3.0}, r"^guidance_scale: 3 is not used, because this network does not embed"),
    ):
        with pytest.warns(RuntimeWarning, match=message) as found:
            DDIM.from_pipeline(pipes[kind], "a dog", **OPTIONS, **options)
        assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDIM.from_pipeline(pipes["distilled"], "a dog", **OPTIONS)


def test_what_does_not_fit_is_refused(pipes: dict[str, Any]) -> None:
    def make(kind: str, *args: Any, **options: Any) -> Any:
        return DDIM.from_pipeline(pipes[kind], *args, **{**OPTIONS, **options})

    with pytest.raises(ValueError, match=r"width: expected a positive multiple of 4 .* patch of 2\), got 18"):
        make("dev", "a dog", width=18)
    with pytest.raises(ValueError, match=r"height: expected 16, the size that this chain's schedule is for \(use_dyna"):
        make("dev", "a dog").noise(height=32)
    with pytest.raises(TypeError, match=r"^image: from_pipeline has no such argument for Flux2Pipeline"):
        make("dev", "a dog", image=torch.zeros(1, 3, 16, 16))
    with pytest.raises(TypeError, match=r"^caption_upsample_temperature: from_pipeline has no such argument for Flux2"):
        make("dev", "a dog", caption_upsample_temperature=0.15)
    with pytest.raises(TypeError, match=r"^negative_prompt_embeds: from_pipeline has no such argument for Flux2Pipel"):
        make("dev", "a dog", negative_prompt_embeds=torch.zeros(1, 8, 48))
    with pytest.raises(ValueError, match=r"^negative_prompt: expected one text, or 1, one for each prompt, got 2"):
        make("klein", "a dog", ["ugly", "blurred"])
    deaf = diffusers.Flux2Pipeline(**{**pipes["dev"].components, "text_encoder": None})
    with pytest.raises(ValueError, match=r"^prompt: Flux2Pipeline has no text_encoder, .* pass prompt_embeds instead"):
        DDIM.from_pipeline(deaf, "a dog")
    other = tiny_flows.flux2()
    other.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(TypeError, match=r"^scheduler: expected one of flow matching .* got EulerDiscreteScheduler"):
        DDIM.from_pipeline(other, "a dog")
    with pytest.raises(ValueError, match=r"^latents: expected shape \(B, 16, height, width\), got"):
        make("dev", "a dog").decode(torch.zeros(1, 4, 8, 8))
