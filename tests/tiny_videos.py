"""Tiny pipelines that make videos, with random weights that matter, made of the classes' own configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import tiny_pipeline
import torch
from tiny_families import awake, t5_encoder, t5_tokenizer, vae
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
    autoencoder = diffusers.AutoencoderKLCogVideoX(
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
        vae=autoencoder.eval(),
        transformer=transformer,
        scheduler=own if scheduler is None else scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ltx(scheduler: Any = None, **changes: Any) -> Any:
    """A pipeline of LTX-Video; changes are those of its VAE."""
    words = t5_tokenizer()
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    torch.manual_seed(4)
    settings: dict[str, Any] = {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 2,
        "scaling_factor": 0.9,
    }
    autoencoder = awake(diffusers.AutoencoderKLLTXVideo(**settings | changes))
    autoencoder.latents_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
    autoencoder.latents_std.copy_(torch.tensor([1.2, 0.8, 2.0, 1.0]))
    own = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=4, shift_terminal=0.1
    )
    pipe = diffusers.LTXPipeline(
        tokenizer=words,
        text_encoder=t5_encoder(words),
        vae=autoencoder,
        transformer=awake(transformer),
        scheduler=own if scheduler is None else scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animatediff(work: Path, scheduler: Any = None, **changes: Any) -> Any:
    """A pipeline of AnimateDiff; changes are those of its UNet."""
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tiny_pipeline.tokenizer(work)
    text_encoder = CLIPTextModel(CLIPTextConfig(**tiny_pipeline.text_settings(words))).eval()
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 8),
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "cross_attention_dim": text_encoder.config.hidden_size,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
    }
    unet = awake(diffusers.UNetMotionModel(**settings | changes))
    own = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipe = diffusers.AnimateDiffPipeline(
        vae=vae(4),
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        motion_adapter=None,
        scheduler=own if scheduler is None else scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
