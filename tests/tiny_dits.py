"""Tiny pipelines of transformers that predict noise, HunyuanDiT and DiT, with random weights that matter."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_families import awake, t5_encoder, t5_tokenizer, vae


def hunyuan_dit(scheduler: Any = None, is_told: bool = True) -> Any:
    from transformers import BertConfig, BertModel

    words = t5_tokenizer()
    torch.manual_seed(0)
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        hidden_size=16,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=is_told,
    )
    torch.manual_seed(4)
    own_vae = diffusers.AutoencoderKL(
        block_out_channels=[4] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.13,
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    pipe = diffusers.HunyuanDiTPipeline(
        vae=own_vae.eval(),
        text_encoder=BertModel(BertConfig(vocab_size=len(words), **sizes)).eval(),
        tokenizer=words,
        transformer=awake(transformer),
        scheduler=diffusers.DDIMScheduler(clip_sample=False) if scheduler is None else scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(words),
        tokenizer_2=words,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit(scheduler: Any = None, learns_variance: bool = True) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if learns_variance else 4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    pipe = diffusers.DiTPipeline(
        transformer=awake(transformer),
        vae=vae(4, scaling_factor=0.13),
        scheduler=diffusers.DDIMScheduler(clip_sample=False) if scheduler is None else scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
