"""Tiny pipelines of families whose text encoder is a language model, with random weights that matter."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_families import awake, t5_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def qwen_image(**scheduler: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = t5_tokenizer()
    torch.manual_seed(0)
    text = {**SIZES, "num_key_value_heads": 2, "vocab_size": len(words), "rope_parameters": None}
    text["rope_scaling"] = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    pipe = diffusers.QwenImagePipeline(
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **{"use_dynamic_shifting": True, "shift_terminal": 0.02, **scheduler}
        ),
        vae=awake(vae),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ).eval(),
        tokenizer=words,
    )
    pipe.default_sample_size = 8
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "red circle {}", 2
    pipe.set_progress_bar_config(disable=True)
    return pipe
