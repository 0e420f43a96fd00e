"""How the prompts of pipelines with one text encoder are encoded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..guided import Guided
from ..hooks import device_of
from .base import Request, keep_given, network_of
from .transformer import check_prompts, no_grad_encode

NAMES = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
"""What an encoded prompt and negative prompt consist of, where prompts have masks."""


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
    cond, uncond = keep_given(dict(zip(names, made, strict=True)), encoding, device_of(network_of(pipe))).values()
    assert cond is not None
    return cond, uncond if guided else None


def encode_masked_pair(
    pipe: Any,
    request: Request,
    encoding: dict[str, Any],
    guided: bool,
    returned: tuple[str, ...] = NAMES,
    **defaults: Any,
) -> tuple[Tensor, Tensor | None, Tensor | Guided]:
    """Returns the embeddings of the prompts, those of the negative prompts, and the masks of their tokens.

    Args:
        pipe: The pipeline.
        request: Its prompt and negative prompt.
        encoding: Arguments of `encode_prompt`.
        guided: Whether the negative prompt is used.
        returned: The names of what the pipeline's `encode_prompt` returns, in its order.
        **defaults: Arguments that the pipeline's `__call__` gives its `encode_prompt` where the caller gives none.
    """
    encoders = ("text_encoder", "tokenizer")
    prompts, negatives = check_prompts(pipe, request, encoding, guided, "prompt_attention_mask", encoders)
    made = no_grad_encode(
        pipe,
        prompt=prompts,
        negative_prompt=negatives,
        do_classifier_free_guidance=guided,
        **{**defaults, **encoding},
    )
    found = {name: value for name, value in zip(returned, made, strict=True) if name in NAMES}
    found = keep_given(found, encoding, device_of(network_of(pipe)))
    cond, mask, uncond, negative_mask = (found[name] for name in NAMES)
    assert cond is not None and mask is not None
    if not guided:
        return cond, None, mask
    assert uncond is not None and negative_mask is not None
    return cond, uncond, Guided(negative_mask, mask)
