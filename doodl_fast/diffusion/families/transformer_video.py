"""What the families of video pipelines whose network is a diffusers transformer share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..latent_space import check_size
from ..video import VideoSpace
from .base import Request, keep_given
from .transformer import check_prompts, no_grad_encode


def video_space(pipe: Any, request: Request, defaults: tuple[int, int, int], patch: int, **shape: Any) -> VideoSpace:
    """Returns the latent space of a pipeline of videos, for the size and the number of frames that are asked for.

    Args:
        pipe: The pipeline.
        request: Its height, width and `num_frames`.
        defaults: The number of frames, the height and the width in pixels where none is given.
        patch: Latents per patch of the network, along height and width.
        **shape: channels, scale_factor, frame_factor and other attributes of `VideoSpace`.

    Raises:
        ValueError: The VAE or the network cannot take the size or the number of frames.
    """
    given = request.options.get("num_frames"), request.height, request.width
    frames, height, width = (own if value is None else value for own, value in zip(defaults, given, strict=True))
    for name, pixels in (("height", height), ("width", width)):
        check_size(name, pixels, shape["scale_factor"], patch, shape.get("largest"))
    space = VideoSpace(
        height=height, width=width, num_frames=frames, device=pipe.transformer.device, patch=patch, **shape
    )
    space.latent_frames()
    return space


def encode_pair(
    pipe: Any, request: Request, encoding: dict[str, Any], guided: bool, **defaults: Any
) -> tuple[Tensor, Tensor | None]:
    """Returns the embeddings of the prompts, and those of the negative prompts where there is guidance.

    Args:
        pipe: A pipeline whose `encode_prompt` returns these two.
        request: Its prompt and negative prompt.
        encoding: Arguments of `encode_prompt`.
        guided: Whether the negative prompt is used.
        **defaults: Arguments that the pipeline's `__call__` gives its `encode_prompt` where the caller gives none.
    """
    prompts, negatives = check_prompts(pipe, request, encoding, guided, None, ("text_encoder", "tokenizer"))
    made = no_grad_encode(
        pipe,
        prompt=prompts,
        negative_prompt=negatives,
        do_classifier_free_guidance=guided,
        **{**defaults, **encoding},
    )
    names = ("prompt_embeds", "negative_prompt_embeds")
    cond, uncond = keep_given(dict(zip(names, made, strict=True)), encoding, pipe.transformer.device).values()
    assert cond is not None
    return cond, uncond if guided else None
