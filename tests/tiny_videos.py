"""Tiny pipelines that make videos, with random weights that matter, made of the classes' own configurations."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_families import awake, t5_encoder, t5_tokenizer
from torch import nn


def wan_transformer(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return awake(diffusers.WanTransformer3DModel(**settings | changes))


def wan_vae() -> Any:
    torch.manual_seed(4)
    made = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[-0.7, 0.1, 0.4, 0.0],
        latents_std=[2.8, 1.4, 0.6, 1.9],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    return made.eval()


def wan(scheduler: Any = None, **changes: Any) -> Any:
    """A pipeline of Wan 2.1; with transformer_2 and boundary_ratio, or expand_timesteps, of Wan 2.2."""
    words = t5_tokenizer()
    parts: dict[str, Any] = {
        "tokenizer": words,
        "text_encoder": t5_encoder(words),
        "vae": wan_vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0) if scheduler is None else scheduler,
        "transformer": wan_transformer(),
    }
    pipe = diffusers.WanPipeline(**parts | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cogvideox(scheduler: Any = None, **changes: Any) -> Any:
    """A pipeline of CogVideoX; with patch_size_t=2 of version 1.5."""
    words = t5_tokenizer()
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 8,
        "use_rotary_positional_embeddings": True,
    }
    transformer = awake(diffusers.CogVideoXTransformer3DModel(**settings | changes))
    torch.manual_seed(4)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
    )
    own = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        snr_shift_scale=3.0,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=words,
        text_encoder=t5_encoder(words),
        vae=vae.eval(),
        transformer=transformer,
        scheduler=own if scheduler is None else scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
