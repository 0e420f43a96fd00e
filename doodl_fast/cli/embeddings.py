"""Embeddings of prompts of the greatest length, of the shapes that the families' networks take, for estimates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..diffusion.families import Family

TOKENS = 77
"""Tokens of CLIP's text encoders."""


def longest_embeddings(pipe: Any, family: Family) -> dict[str, Any]:
    """Returns embeddings of a prompt of the greatest length, and of a negative one, as `from_pipeline` takes them.

    Args:
        pipe: A pipeline of the family, whose text encoders are not read.
        family: Its family.
    """
    if not family.takes_text:
        return {}
    return next(EMBEDDINGS[kind.__name__](pipe) for kind in type(family).__mro__ if kind.__name__ in EMBEDDINGS)


def _pair(name: str, *shape: int) -> dict[str, Tensor]:
    """A prompt's embedding and the negative prompt's, of one shape, or masks of their tokens."""
    dtype = torch.bool if "mask" in name else torch.float32
    return {prefix + name: torch.ones(shape, dtype=dtype) for prefix in ("", "negative_")}


def _masked(tokens: int, features: int, suffix: str = "") -> dict[str, Tensor]:
    """Embeddings of so many tokens, with their masks."""
    masks = _pair(f"prompt_attention_mask{suffix}", 1, tokens)
    return _pair(f"prompt_embeds{suffix}", 1, tokens, features) | masks


def _stable_diffusion(pipe: Any) -> dict[str, Tensor]:
    config = pipe.unet.config
    found = _pair("prompt_embeds", 1, TOKENS, config.cross_attention_dim)
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found |= _pair("pooled_prompt_embeds", 1, pooled)
    return found


def _stable_diffusion_3(pipe: Any) -> dict[str, Tensor]:
    config = pipe.transformer.config
    pooled = _pair("pooled_prompt_embeds", 1, config.pooled_projection_dim)
    return _pair("prompt_embeds", 1, TOKENS + 256, config.joint_attention_dim) | pooled


def _flux(pipe: Any) -> dict[str, Tensor]:
    config = pipe.transformer.config
    return {
        "prompt_embeds": torch.ones(1, 512, config.joint_attention_dim),
        "pooled_prompt_embeds": torch.ones(1, config.pooled_projection_dim),
    }


def _flux2(pipe: Any) -> dict[str, Tensor]:
    found = _pair("prompt_embeds", 1, 512, pipe.transformer.config.joint_attention_dim)
    if type(pipe).__name__ != "Flux2KleinPipeline":
        del found["negative_prompt_embeds"]
    return found


def _qwen_image(pipe: Any) -> dict[str, Tensor]:
    return _pair("prompt_embeds", 1, 512, pipe.transformer.config.joint_attention_dim)


def _chroma(pipe: Any) -> dict[str, Tensor]:
    # Its masks are numbers, which are added to the products of queries and keys.
    return {name: value.float() for name, value in _masked(512, pipe.transformer.config.joint_attention_dim).items()}


def _lumina2(pipe: Any) -> dict[str, Tensor]:
    config = pipe.transformer.config
    return _masked(min(256, config.axes_lens[0] - 1), config.cap_feat_dim)


def _z_image(pipe: Any) -> dict[str, list[Tensor]]:
    config, rows = pipe.transformer.config, 32
    # The network pads a prompt to whole rows, and has a position for each token and for two kinds of padding.
    tokens = min(512, (config.axes_lens[0] - 2) // rows * rows)
    lone = _pair("prompt_embeds", tokens, config.cap_feat_dim)
    return {name: [states] for name, states in lone.items()}


def _hunyuan_dit(pipe: Any) -> dict[str, Tensor]:
    config = pipe.transformer.config
    clip = _masked(config.text_len, config.cross_attention_dim)
    return clip | _masked(config.text_len_t5, config.cross_attention_dim_t5, "_2")


def _pixart(pipe: Any) -> dict[str, Tensor]:
    tokens = 120 if type(pipe).__name__ == "PixArtAlphaPipeline" else 300
    return _masked(tokens, pipe.transformer.config.caption_channels)


def _cogvideox(pipe: Any) -> dict[str, Tensor]:
    config = pipe.transformer.config
    return _pair("prompt_embeds", 1, config.max_text_seq_length, config.text_embed_dim)


def _audioldm2(pipe: Any) -> dict[str, Tensor]:
    # Each block attends to the latents (None), to what the language model generates, and to T5's embeddings.
    _, generated, states = pipe.unet.config.cross_attention_dim[0]
    tokens = 128
    found = _pair("generated_prompt_embeds", 1, 8, generated) | _pair("prompt_embeds", 1, tokens, states)
    return found | _pair("attention_mask", 1, tokens)


def _stable_audio(pipe: Any) -> dict[str, Tensor]:
    found = _pair("prompt_embeds", 1, 128, pipe.projection_model.config.text_encoder_dim)
    return found | _pair("attention_mask", 1, 128)


def _deepfloyd_if(pipe: Any) -> dict[str, Tensor]:
    config = pipe.unet.config
    return _pair("prompt_embeds", 1, TOKENS, config.encoder_hid_dim or config.cross_attention_dim)


EMBEDDINGS: dict[str, Callable[[Any], Any]] = {
    "StableDiffusion": _stable_diffusion,
    "AnimateDiff": _stable_diffusion,
    "StableDiffusion3": _stable_diffusion_3,
    "Flux": _flux,
    "Flux2": _flux2,
    "QwenImage": _qwen_image,
    "Sana": lambda pipe: _masked(300, pipe.transformer.config.caption_channels),
    "Lumina2": _lumina2,
    "AuraFlow": lambda pipe: _masked(256, pipe.transformer.config.joint_attention_dim),
    "Chroma": _chroma,
    "ZImage": _z_image,
    "HunyuanDiT": _hunyuan_dit,
    "PixArt": _pixart,
    "Wan": lambda pipe: _pair("prompt_embeds", 1, 512, pipe.transformer.config.text_dim),
    "CogVideoX": _cogvideox,
    "LTX": lambda pipe: _masked(128, pipe.transformer.config.caption_channels),
    "AudioLDM2": _audioldm2,
    "StableAudio": _stable_audio,
    "DeepFloydIF": _deepfloyd_if,
}
"""The embeddings of one prompt of the greatest length, by the name of the family. Texts of AudioLDM 2 have no greatest
length; 128 tokens are long."""
