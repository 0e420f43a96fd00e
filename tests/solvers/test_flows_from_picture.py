"""Flows that start from a picture: the pipelines' own latents, and naive autograd's gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import tiny_flows
import torch
from conftest import relative
from torch import Tensor

from doodl_fast.diffusion.families.flux import pack
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.sampler import Sampler

KINDS = {
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
    "qwen_image": "QwenImageImg2ImgPipeline",
    "chroma": "ChromaImg2ImgPipeline",
    "z_image": "ZImageImg2ImgPipeline",
}
PACKED = ("flux", "qwen_image", "chroma")
OPTIONS: dict[str, Any] = {"num_inference_steps": 5, "max_sequence_length": 8, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work: Path = tmp_path_factory.mktemp("pipes")
    base = {"sd3": tiny_families.stable_diffusion_3(work), "flux": tiny_families.flux(work)}
    base |= {kind: getattr(tiny_flows, kind)() for kind in list(KINDS)[2:]}
    made = {}
    for kind, pipe in base.items():
        made[kind] = getattr(diffusers, KINDS[kind])(**pipe.components)
        made[kind].set_progress_bar_config(disable=True)
        made[kind].default_sample_size = 8
        for name in ("prompt_template_encode", "prompt_template_encode_start_idx"):
            if hasattr(pipe, name):
                setattr(made[kind], name, getattr(pipe, name))
    return made


def picture(seed: int = 0, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def options_of(kind: str, **more: Any) -> dict[str, Any]:
    negative = {"negative_prompt": "ugly"} if kind != "flux" else {}
    return {**OPTIONS, **negative, **more}


def compare(pipe: Any, kind: str, solver: Any, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The start of a chain, its end, and what the pipeline makes with a generator of the same seed."""
    chain = solver.from_pipeline(pipe, "a dog", memory="checkpoint", **options)
    x = chain.noise(seed=3)
    generator = torch.Generator().manual_seed(3)
    expected = pipe(prompt="a dog", generator=generator, output_type="latent", **options).images
    packed = pack if kind in PACKED else torch.clone
    with torch.no_grad():
        return packed(x), packed(chain(x)[0]), expected


@pytest.mark.parametrize("solver", [DDIM, Sampler])
@pytest.mark.parametrize("kind", KINDS)
def test_latents(pipes: dict[str, Any], kind: str, solver: Any) -> None:
    options = options_of(kind, image=picture(), strength=0.75)
    x, x0, expected = compare(pipes[kind], kind, solver, options)
    assert relative(x0, expected) < 1e-5 and relative(x, expected) > 0.1
    other = {**options, "image": picture(seed=1)}
    assert relative(compare(pipes[kind], kind, solver, other)[1], expected) > 1e-3, "the picture must matter"


@pytest.mark.parametrize("kind", KINDS)
def test_latents_in_place_of_a_picture_and_the_default_strength(pipes: dict[str, Any], kind: str) -> None:
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(7))
    options = options_of(kind, image=latents, num_inference_steps=10)
    _, x0, expected = compare(pipes[kind], kind, DDIM, options)
    assert relative(x0, expected) < 1e-5
    chain = DDIM.from_pipeline(pipes[kind], "a dog", **options)
    assert len(chain.schedule) == (9 if kind == "chroma" else 6), "the pipeline's own strength"


def test_a_picture_of_another_size_is_resized_as_the_pipeline_does(pipes: dict[str, Any]) -> None:
    options = {name: value for name, value in options_of("flux").items() if name not in ("height", "width")}
    options |= {"image": picture(height=32, width=20), "strength": 0.6}
    x, x0, expected = compare(pipes["flux"], "flux", DDIM, options)
    assert x.shape == (1, 16, 16) and relative(x0, expected) < 1e-5


@pytest.mark.parametrize("kind", ["flux", "qwen_image"])
@pytest.mark.parametrize(("solver", "memory"), [(DDIM, "checkpoint"), (Sampler, "auto"), (EDICT, "reversible")])
def test_gradients_of_the_picture_and_of_the_noise(pipes: dict[str, Any], kind: str, solver: Any, memory: str) -> None:
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    found = []
    for mode in ("naive", memory):
        latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(7)).requires_grad_()
        own = noise.clone().requires_grad_()
        options = options_of(kind, image=latents, strength=0.8)
        chain = solver.from_pipeline(pipes[kind], "a dog", memory=mode, **options)
        start = chain.noised(latents, own)
        assert torch.allclose(chain.noise(seed=5), start)
        loss = sum(end.square().mean() for end in chain(start))
        found.append(torch.autograd.grad(loss, [latents, own]))
    for got, want in zip(found[1], found[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-5


def test_what_does_not_fit_is_refused(pipes: dict[str, Any]) -> None:
    def make(kind: str, **options: Any) -> Any:
        return DDIM.from_pipeline(pipes[kind], "a dog", **options_of(kind, **options))

    with pytest.raises(TypeError, match=r"^image: expected a picture, from which FluxImg2ImgPipeline starts, got None"):
        make("flux")
    with pytest.raises(ValueError, match=r"^strength: expected a number from 0 to 1, got 1.5"):
        make("flux", image=picture(), strength=1.5)
    with pytest.raises(ValueError, match=r"^strength: leaves none of the 5 steps to do"):
        make("flux", image=picture(), strength=0.0)
    with pytest.raises(ValueError, match=r"^image: expected latents \(1 or B, 4, h, w\) because it requires grad"):
        make("qwen_image", image=picture().requires_grad_())
    with pytest.raises(ValueError, match=r"^height: expected 16, the size that the picture that this chain starts fro"):
        make("sd3", image=picture()).noise(height=32)
    with pytest.raises(ValueError, match=r"^batch: expected a multiple of 2, the number of pictures, got 3"):
        make("sd3", image=torch.cat([picture(), picture()])).noise(batch=3)
    with pytest.raises(TypeError, match=r"^mask_image: from_pipeline has no such argument for FluxImg2ImgPipeline"):
        make("flux", image=picture(), mask_image=picture())
    with pytest.warns(RuntimeWarning, match=r"^negative_prompt: it is not used with true_cfg_scale=1") as found:
        make("flux", image=picture(), negative_prompt="ugly")
    assert [w.filename for w in found] == [__file__]
