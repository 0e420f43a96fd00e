"""Loading a diffusers pipeline, encoding its prompts and drawing its starting noise.

diffusers is imported when a pipeline is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .decoder import Decoder, vae_scale_factor
from .guided import Guided
from .images import to_pil
from .latent_space import default_size, latent_space
from .networks import check_source, loading

__all__ = [
    "Decoder",
    "encode_conditions",
    "encode_prompt",
    "initial_latents",
    "load_pipeline",
    "to_pil",
    "vae_scale_factor",
]
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# Components that a chain uses, or whose absence changes no picture.
KNOWN_COMPONENTS = (
    *COMPONENTS,
    *("text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor", "image_encoder"),
)
VIDEO_UNETS = ("UNetMotionModel", "UNet3DConditionModel", "UNetSpatioTemporalConditionModel", "I2VGenXLUNet")
PIPELINE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_pipeline(
    model: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Any:
    """Loads a text-to-image diffusers pipeline, in eval mode and with its weights frozen.

    The safety checker is left out. Only safetensors are read, never pickles.

    Args:
        model: A local folder with model_index.json, or a hub id such as `org/name`.
        device: Where the networks are put.
        dtype: Of all networks. An SDXL VAE that asks for it (`force_upcast`) stays in float32 when this is fp16, in
            which it overflows.
        variant: Of the weight files, "fp16" for instance.

    Returns:
        The diffusers pipeline.

    Raises:
        ValueError: There is no such folder, it holds no diffusers pipeline, the hub does not have it or cannot be
            reached, the pipeline lacks a UNet, VAE, text encoder, tokenizer or scheduler, it has a component that would
            be ignored (a ControlNet, for instance), it makes videos, or its UNet takes more than latents (inpainting,
            for instance).
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
    missing = [name for name in COMPONENTS if not _is_component(index.get(name))]
    if missing:
        raise ValueError(
            f"model: expected a pipeline with {', '.join(COMPONENTS)}, got {index.get('_class_name')} in {source!r} "
            f"without {', '.join(missing)}; use a Stable-Diffusion-style model"
        )
    _refuse_ignored(index, source)
    is_xl = "text_encoder_2" in index
    dtypes = {"vae": torch.float32, "default": dtype} if is_xl and dtype == torch.float16 else {"default": dtype}
    options: dict[str, Any] = {"use_safetensors": True, "dtype": dtypes}
    options |= {"safety_checker": None} if "safety_checker" in index else {}
    options |= {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    options |= {"variant": variant} if variant else {}
    with loading(source):
        pipeline = DiffusionPipeline.from_pretrained(source, **options)
    channels, expected = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != expected:
        raise ValueError(
            f"model: expected a UNet of {expected} input channels (the latents'), got {channels} in {source!r}; "
            "inpainting, upscaling and depth models take more than a prompt"
        )
    networks: dict[str, Any] = {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}
    for name, network in networks.items():
        network.eval().requires_grad_(False).to(device)
        wanted = torch.float32 if name == "vae" and "vae" in dtypes and network.config.force_upcast else dtype
        if network.dtype != wanted:  # also where a version of diffusers does not know `dtype` yet
            network.to(wanted)
    return pipeline


def _is_component(entry: Any) -> bool:
    """Whether an entry of model_index.json names the library and the class of a component."""
    return isinstance(entry, (list, tuple)) and any(entry)


def _refuse_ignored(index: dict[str, Any], source: str) -> None:
    """Refuses a pipeline of which a component would be ignored, by its model_index.json, before anything is loaded."""
    kind = index.get("_class_name")
    parts = {name: value for name, value in index.items() if _is_component(value)}
    ignored = sorted(name for name in parts if name not in KNOWN_COMPONENTS and not name.startswith("_"))
    if parts["unet"][-1] in VIDEO_UNETS or "motion_adapter" in ignored:
        raise ValueError(f"model: {kind} in {source!r} makes videos, which is not supported; use a text-to-image model")
    if ignored:
        raise ValueError(
            f"model: {kind} in {source!r} has {', '.join(ignored)}, which would be ignored; use a folder of the model "
            "without it"
        )


def encode_prompt(
    pipeline: Any,
    prompt: str | list[str],
    negative_prompt: str | list[str] = "",
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Encodes prompts with a pipeline's own text encoders, for `Denoiser(pipeline.unet, cond, uncond, **unet_kwargs)`.

    Args:
        pipeline: A diffusers pipeline of the Stable Diffusion family.
        prompt: One prompt or a list of N prompts.
        negative_prompt: One text for all prompts, or one for each. With "" SDXL has embeddings of zeros.
        height: Height of the picture in pixels, of which SDXL is told. None is the pipeline's own.
        width: Width of the picture in pixels.
        batch: B of the latents, for SDXL's conditions. One prompt serves any.

    Returns:
        cond, uncond and unet_kwargs. cond and uncond are (N, tokens, features). unet_kwargs is empty for Stable
        Diffusion 1 and 2. For SDXL (arXiv 2307.01952) it has `added_cond_kwargs` with text_embeds (2B, features) and
        time_ids (2B, 6), the unconditional half first.

    Raises:
        TypeError: A prompt is no text.
    """
    cond, uncond, unet_kwargs = encode_conditions(pipeline, prompt, negative_prompt, height=height, width=width)
    assert uncond is not None
    if unet_kwargs:
        added = unet_kwargs["added_cond_kwargs"]
        rows = max(batch, len(cond))
        pooled = torch.cat([half.expand(rows, -1) for half in added["text_embeds"]])
        unet_kwargs = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": added["time_ids"].repeat(2 * rows, 1)}}
    return cond, uncond, unet_kwargs


def encode_conditions(
    pipeline: Any,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None = "",
    *,
    height: int | None = None,
    width: int | None = None,
    guided: bool = True,
    **encoding: Any,
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Encodes prompts into conditions that serve a batch of any size.

    Args:
        pipeline: A diffusers pipeline of the Stable Diffusion family.
        prompt: One prompt or a list of N prompts; None with `prompt_embeds`.
        negative_prompt: One text for all prompts, or one for each. With "" SDXL has embeddings of zeros.
        height: Height of the picture in pixels, of which SDXL is told. None is the pipeline's own.
        width: Width of the picture in pixels.
        guided: Whether the negative prompt is encoded too.
        **encoding: Further arguments of the pipeline's `encode_prompt`: prompt_embeds, negative_prompt_embeds,
            clip_skip, lora_scale; for SDXL also pooled_prompt_embeds, prompt_2 and the like. Embeddings that are given
            are used as they are, so that gradients reach them.

    Returns:
        As `encode_prompt`, but that uncond is None unless `guided`, text_embeds is a `Guided` pair of (N, features)
        (the conditional tensor alone unless `guided`), and time_ids is (1, 6).

    Raises:
        TypeError: A prompt is no text.
        ValueError: A prompt and its embeddings are both given.
    """
    texts, count = prompt_texts(prompt, negative_prompt, encoding)
    device = pipeline.unet.device
    negative = texts["negative_prompt"]
    if isinstance(negative, str):
        # None is the pipelines' word for "no negative prompt": SDXL has embeddings of zeros for it
        negative = [negative] * count if negative else None
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt=[prompt] if isinstance(prompt, str) else texts["prompt"],
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
            **encoding,
        )
    # Embeddings that the caller gave keep their graph, which the pipeline's own handling has cut.
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    cond, uncond, *pools = (
        made if encoding.get(name) is None else encoding[name].to(device)
        for name, made in zip(names, encoded, strict=False)
    )
    if not pools:
        return cond, uncond, {}
    pooled: Tensor | Guided = Guided(pools[1], pools[0]) if guided else pools[0]
    height, width = default_size(pipeline, height, width)
    sizes = [height, width, 0, 0, height, width]  # original size, top left corner of the crop, target size
    time_ids = torch.tensor([sizes], device=device, dtype=cond.dtype)
    return cond, uncond if guided else None, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def prompt_texts(
    prompt: Any, negative_prompt: Any, encoding: Mapping[str, Any]
) -> tuple[dict[str, str | list[str] | None], int]:
    """Checks the prompts against the embeddings that are given.

    Args:
        prompt: One prompt or a list of N prompts; None with `prompt_embeds`.
        negative_prompt: One text for all prompts, or one for each; None is "".
        encoding: Arguments of `encode_prompt`, of which `prompt_embeds` and `negative_prompt_embeds` count.

    Returns:
        The prompt and the negative prompt by name, None where there are embeddings, and N.

    Raises:
        TypeError: A prompt is no text.
        ValueError: A prompt and its embeddings are both given.
    """
    texts = {"prompt": prompt, "negative_prompt": "" if negative_prompt is None else negative_prompt}
    for name, value in texts.items():
        if encoding.get(f"{name}_embeds") is not None:
            if value:
                raise ValueError(
                    f"{name}: expected None because {name}_embeds is given, got {value!r}; pass one of them"
                )
            texts[name] = None
            continue
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(isinstance(text, str) for text in entries):
            raise TypeError(f"{name}: expected a string or a list of strings, got {value!r}")
    given = encoding.get("prompt_embeds")
    return texts, len(given) if given is not None else len(prompt) if isinstance(prompt, list) else 1


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
