"""Prompts as conditions: the checks of prompts and embeddings, and the encoding by Stable Diffusion's pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .guided import Guided
from .hooks import device_of
from .latent_space import default_size


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
    negative_prompt: str | list[str] = "",
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
    device = device_of(pipeline.unet)
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
        negative_prompt: One text for all prompts, or one for each.
        encoding: Arguments of `encode_prompt`, of which `prompt_embeds` and `negative_prompt_embeds` count.

    Returns:
        The prompt and the negative prompt by name, None where there are embeddings, and N.

    Raises:
        TypeError: A prompt is no text.
        ValueError: A prompt and its embeddings are both given.
    """
    texts = {"prompt": prompt, "negative_prompt": negative_prompt}
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
