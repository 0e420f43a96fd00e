"""The networks of the embedded pipeline: Stable Diffusion's classes, small enough to train on two CPU cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..scenes import SIZE, VARIETY_NAMES
from .tokenizer import MAX_TOKENS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ResNetForImageClassification

TEXT_WIDTH = 128
TEXT_LAYERS = 3
LATENT_SIZE = SIZE // 4


def text_config(words: CLIPTokenizer) -> dict[str, object]:
    """Returns the configuration of the text encoders of Stable Diffusion and CLIP."""
    return {
        "vocab_size": len(words),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "projection_dim": TEXT_WIDTH,
    }


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """Returns a text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**text_config(words)))


def vae() -> AutoencoderKL:
    """Returns a VAE with random weights: pictures of 64 x 64 pixels, latents of 4 x 16 x 16."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=SIZE,
        block_out_channels=(8, 24, 48),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    """Returns a UNet with random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Returns a DDIM scheduler with the noise schedule of Stable Diffusion 1.x."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def clip(words: CLIPTokenizer) -> CLIPModel:
    """Returns a CLIP model with random weights."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": TEXT_WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text_config(words), vision_config=vision, projection_dim=TEXT_WIDTH))


def classifier() -> ResNetForImageClassification:
    """Returns a classifier of the varieties with random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[24, 48, 96],
            depths=[1, 1, 1],
            layer_type="basic",
            num_labels=len(VARIETY_NAMES),
            id2label=dict(enumerate(VARIETY_NAMES)),
            label2id={name: i for i, name in enumerate(VARIETY_NAMES)},
        )
    )
