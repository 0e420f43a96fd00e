"""Networks whose weights are elsewhere between their calls: noise and pictures are made where they compute."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny_pipeline
import torch
from recorded_gen import picture, quick
from torch import Tensor

from doodl_fast.compat.edict import coupled_stablediffusion
from doodl_fast.compat.edict_pipeline import EDICTPipeline
from doodl_fast.compat.gen import gen

OWN = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def by_gen(pipe: Any) -> Tensor:
    return gen(**quick(pipeline=pipe, source_im=picture(), cond_prompt="a dog")).images[0]


def by_gen_from_noise(pipe: Any) -> Tensor:
    return gen(**quick(pipeline=pipe, cond_prompt="a dog")).images[0]


def by_edict(pipe: Any) -> Tensor:
    options: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "pipeline": pipe, "seed": 1}
    inverted = coupled_stablediffusion("a dog", reverse=True, init_image=picture(), **options)
    drawn = coupled_stablediffusion("a dog", return_latents=True, **options)
    return torch.stack([*inverted, *drawn])


def by_the_community_pipeline(pipe: Any) -> Tensor:
    own = EDICTPipeline(**{name: getattr(pipe, name) for name in OWN})
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.5, "output_type": "pt", "generator": generator}
    found: Tensor = own("a dog", "a cat", picture(), **options)
    return found


@pytest.mark.parametrize("make", [by_gen, by_gen_from_noise, by_edict, by_the_community_pipeline])
def test_the_same_pictures(make: Callable[[Any], Tensor], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline.stable_diffusion(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    expected = make(pipe)
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    for network in networks:  # What accelerate leaves of a network that is offloaded, but for the moving itself.
        network._hf_hook = SimpleNamespace(execution_device="cpu")
    for kind in (diffusers.ModelMixin, type(pipe.text_encoder)):
        monkeypatch.setattr(kind, "device", property(lambda _: torch.device("meta")))
    assert all(network.device.type == "meta" for network in networks)
    assert torch.equal(make(pipe), expected) and expected.std() > 0.01
