"""Loading a diffusers pipeline, encoding its prompts and drawing its starting noise.

diffusers is imported when a pipeline is loaded.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .decoder import Decoder, vae_scale_factor
from .families import Family
from .families.saved import LEFT_OUT, check_accelerate, family_of_index, upcasts_vae
from .images import to_pil
from .latent_space import latent_space
from .networks import check_source, loading
from .prompts import encode_conditions, encode_prompt

__all__ = [
    "Decoder",
    "encode_conditions",
    "encode_prompt",
    "initial_latents",
    "load_pipeline",
    "to_pil",
    "vae_scale_factor",
]
PIPELINE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_pipeline(
    model: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    family: Family | None = None,
) -> Any:
    """Loads a diffusers pipeline of a known family, in eval mode and with its weights frozen.

    The family is picked by the pipeline's class, and its components are checked by their list, before anything is
    loaded. Safety checkers and watermarkers are left out. Only safetensors are read, never pickles.

    Args:
        model: A local folder with model_index.json, or a hub id such as `org/name`.
        device: Where the networks are put.
        dtype: Of all networks. A VAE that asks for it (`force_upcast`) stays in float32 when this is fp16, if it is of
            a pipeline that would upcast it (Stable Diffusion XL, for instance); it would overflow in fp16.
        variant: Of the weight files, "fp16" for instance.
        family: Your own adapter for a class of pipelines that is not known, see docs/adapters.md.

    Returns:
        The diffusers pipeline.

    Raises:
        ValueError: There is no such folder, it holds no diffusers pipeline, the hub does not have it or cannot be
            reached, its class is not known, or the family refuses it: a component is missing or would be ignored (a
            ControlNet, for instance), or a network takes more than latents and a prompt.
    """
    from diffusers import DiffusionPipeline

    source = check_source(model, "model_index.json")
    if dtype not in PIPELINE_DTYPES:
        raise ValueError(f"dtype: expected one of {PIPELINE_DTYPES}, got {dtype!r}")
    with loading(source):
        index = DiffusionPipeline.load_config(source)
    if not isinstance(index, dict):
        raise ValueError(
            f"model: expected model_index.json in {source!r} to hold an object, got {type(index).__name__}"
        )
    family = family_of_index(index, source, family)
    check_accelerate(index, source)
    keeps_vae = dtype == torch.float16 and "vae" in index and upcasts_vae(index)
    dtypes = {"vae": torch.float32, "default": dtype} if keeps_vae else {"default": dtype}
    options: dict[str, Any] = {"use_safetensors": True, "dtype": dtypes}
    options |= {name: None for name in LEFT_OUT if name in index}
    options |= {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    options |= {"variant": variant} if variant else {}
    with loading(source):
        pipeline = DiffusionPipeline.from_pretrained(source, **options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from_pipeline gives the same warnings.
            family.check(pipeline)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {str(error).removeprefix('pipe: ')} (in {source!r})") from error
    networks: dict[str, Any] = {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}
    for name, network in networks.items():
        network.eval().requires_grad_(False).to(device)
        wanted = torch.float32 if name == "vae" and keeps_vae and network.config.get("force_upcast") else dtype
        if network.dtype != wanted:  # also where a version of diffusers does not know `dtype` yet
            network.to(wanted)
    return pipeline


def initial_latents(
    pipeline: Any,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    batch: int = 1,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws a pipeline's starting noise, standard normal.

    It is drawn in float32 on the CPU, so that a seed means the same picture on every device and in every dtype. Sizes
    that the UNet cannot halve evenly are fine, because diffusers' UNets interpolate.

    Args:
        pipeline: A diffusers pipeline with a UNet and a VAE.
        height: Height of the picture in pixels. None is the pipeline's own.
        width: Width of the picture in pixels. None is the pipeline's own.
        seed: Of the noise.
        batch: How many latents B.
        device: Of the result. None is the pipeline's.
        dtype: Of the result.

    Returns:
        Latents (B, C, height / f, width / f), where f is the VAE's scale factor.

    Raises:
        ValueError: A size is no positive multiple of f, or the batch is below 1.
    """
    return latent_space(pipeline, size_is_free=True).noise(seed, batch, height, width, device=device, dtype=dtype)
