"""Tiny diffusers and transformers models in the formats of the real ones, for the tests of what loads and uses them.

They are on the CPU, wherever the tests of the chain run; only `golden_vae` is on the device of those tests.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import DEVICE, GOLDEN, golden, golden_unet, sd_scheduler

WORDS = 77


@cache
def golden_vae(dtype: torch.dtype = torch.float32) -> Any:
    """Returns the recorded AutoencoderKL. It is shared, so its mode and its flags must not be changed."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**json.loads((GOLDEN / "vae_config.json").read_text()))
    vae.load_state_dict({key[4:]: value for key, value in golden("models").items() if key.startswith("vae/")})
    return vae.to(DEVICE, dtype).eval()


def on_cpu(module: Any) -> Any:
    """Returns a module, or a copy of it if it is on another device than the CPU."""
    return module if DEVICE.type == "cpu" else copy.deepcopy(module).cpu()


def tokenizer(folder: Path) -> Any:
    """Returns a byte-level CLIP tokenizer in which every letter is a token."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=WORDS)


def text_settings(words: Any, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": WORDS,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "projection_dim": 16,
        **changes,
    }


def stable_diffusion(work: Path) -> Any:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tokenizer(work)
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=on_cpu(golden_vae()),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_settings(words))).eval(),
        tokenizer=words,
        unet=on_cpu(golden_unet()),
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(work: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer(work)
    torch.manual_seed(0)
    config = json.loads((GOLDEN / "unet_config.json").read_text())
    config |= {
        "cross_attention_dim": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }
    return StableDiffusionXLPipeline(
        vae=on_cpu(golden_vae()),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_settings(words))).eval(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text_settings(words))).eval(),
        tokenizer=words,
        tokenizer_2=words,
        unet=UNet2DConditionModel(**config).eval(),
        scheduler=sd_scheduler(),
    )


def clip(work: Path, size: int = 32) -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    words = tokenizer(work)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": 8,
        "projection_dim": 16,
    }
    torch.manual_seed(1)
    config = CLIPConfig(text_config=text_settings(words), vision_config=vision, projection_dim=16)
    pictures = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return CLIPModel(config).eval(), CLIPProcessor(pictures, words)


def classifier() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    names = ["red star", "blue circle", "tench, Tinca tinca", "green square"]
    torch.manual_seed(2)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return ResNetForImageClassification(config).eval()


def golden_vae_copy(dtype: torch.dtype) -> Any:
    """Returns a copy that the caller may change."""
    return copy.deepcopy(golden_vae()).to(dtype)
