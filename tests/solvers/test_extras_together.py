"""What stands around Stable Diffusion's UNet is loaded from folders, optimised, copied and pickled with its chain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pickled, relative
from tiny_extras import controlnet, picture, pipelines, unet_like, with_parts, with_t2i_adapter
from tolerances import FP32

import doodl_fast
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT

SIZE = {"height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, Any]]]:
    base = pipelines(tmp_path_factory.mktemp("pipes"))
    sd, mask = base["sd"], torch.zeros(1, 1, 64, 64)
    mask[..., 20:40] = 1
    painted = {"image": picture(), "mask_image": mask, "strength": 0.8}
    return {
        "ControlNet": (
            with_parts("StableDiffusionControlNetPipeline", sd, controlnet=controlnet(sd.unet)),
            {"image": picture(), "control_guidance_end": 0.5},
        ),
        "T2I-Adapter": (with_t2i_adapter(sd), {"image": picture()}),
        "9 channels": (with_parts("StableDiffusionInpaintPipeline", sd, unet=unet_like(sd, in_channels=9)), painted),
        "4 channels": (with_parts("StableDiffusionInpaintPipeline", sd), painted),
        "InstructPix2Pix": (
            with_parts("StableDiffusionInstructPix2PixPipeline", sd, unet=unet_like(sd, in_channels=8)),
            {"image": picture()},
        ),
        "PAG": (with_parts("StableDiffusionPAGPipeline", sd), {"guidance_rescale": 0.0}),
        "SDXL from a picture": (
            with_parts("StableDiffusionXLImg2ImgPipeline", base["xl"]),
            {"image": picture(), "strength": 0.5},
        ),
    }


KINDS = ("ControlNet", "T2I-Adapter", "9 channels", "4 channels", "InstructPix2Pix", "PAG", "SDXL from a picture")


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_loaded_copied_and_pickled(cases: dict[str, Any], kind: str, tmp_path: Path) -> None:
    pipe, options = cases[kind]
    pipe.save_pretrained(tmp_path)
    chain = DDIM.from_pipeline(pipe, "a dog", memory="checkpoint", **SIZE, **options)
    loaded = DDIM.from_pretrained(tmp_path, "a dog", memory="checkpoint", **SIZE, **options)
    x = chain.noise(seed=1)
    with torch.no_grad():
        expected = chain(x)[0]
        for other in (loaded, copy.deepcopy(chain), pickled(chain)):
            assert relative(other(x)[0], expected) < FP32
            assert torch.equal(other.noise(seed=1), x)
            assert relative(other.decode(expected), chain.decode(expected)) < FP32


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_optimised(cases: dict[str, Any], kind: str) -> None:
    pipe, options = cases[kind]
    chain = EDICT.from_pipeline(pipe, "a dog", **SIZE, **options)
    result = doodl_fast.optimize(
        chain, chain.noise(seed=1), chain.decode, lambda image: (image - 0.3).square().mean(), 3, progress=False
    )
    assert result.losses[-1] < result.losses[0]
