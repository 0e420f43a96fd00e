"""Tiny pipelines of families whose text encoder is a language model, with random weights that matter."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_families import awake, t5_encoder, t5_tokenizer, vae

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
    own_vae = diffusers.AutoencoderKLQwenImage(
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
        vae=awake(own_vae),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ).eval(),
        tokenizer=words,
    )
    pipe.default_sample_size = 8
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "red circle {}", 2
    pipe.set_progress_bar_config(disable=True)
    return pipe


PARTS = "{% for part in message.content %}{{ part.text }} {% endfor %}"
TEXT = "{% if message.content is string %}{{ message.content }}{% else %}" + PARTS + "{% endif %}"
CHAT = "{% for message in messages %}" + TEXT + "{% endfor %}"


def flux2(is_klein: bool = False, is_distilled: bool = False, **scheduler: Any) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    words = t5_tokenizer()
    words.chat_template = CHAT
    torch.manual_seed(0)
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(words)}
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4, "head_dim": 8}
    if is_klein:
        encoder = Qwen3ForCausalLM(Qwen3Config(**text))
    else:
        both = {"text_config": {"model_type": "mistral", **text}, "vision_config": {"model_type": "pixtral", **vision}}
        encoder = Mistral3ForConditionalGeneration(Mistral3Config(**both))
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not is_klein,
    )
    own_vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    for block in transformer.transformer_blocks:  # The prompt must matter more than its few tokens would make it.
        block.attn.add_v_proj.weight.data.mul_(10)
    generator = torch.Generator().manual_seed(6)
    own_vae.bn.running_mean.copy_(torch.randn(16, generator=generator))
    own_vae.bn.running_var.copy_(torch.rand(16, generator=generator) + 0.5)
    made = diffusers.Flux2KleinPipeline if is_klein else diffusers.Flux2Pipeline
    pipe = made(
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **scheduler}),
        vae=own_vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=words,
        **({"is_distilled": is_distilled} if is_klein else {}),
    )
    pipe.default_sample_size, pipe.system_message = 8, "a"
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gemma(words: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(3)
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(words), "query_pre_attn_scalar": 8}
    return Gemma2Model(Gemma2Config(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=2)).eval()


def sana(scheduler: Any = None) -> Any:
    words = t5_tokenizer()
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    torch.manual_seed(4)
    blocks = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 16)}
    blocks |= {"layers_per_block": (1, 1), "qkv_multiscales": ((), (5,))}
    coder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_act_fns="silu",
        scaling_factor=0.41,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()},
    )
    pipe = diffusers.SanaPipeline(
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0) if scheduler is None else scheduler,
        vae=coder.eval(),
        text_encoder=gemma(words),
        tokenizer=words,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lumina2(**scheduler: Any) -> Any:
    words = t5_tokenizer()
    torch.manual_seed(0)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(40, 16, 16),
        cap_feat_dim=16,
    )
    pipe = diffusers.Lumina2Pipeline(
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 6.0, **scheduler}),
        vae=vae(4, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=gemma(words),
        tokenizer=words,
    )
    pipe.vae_scale_factor, pipe.system_prompt = 2, "red"
    pipe.set_progress_bar_config(disable=True)
    return pipe


def aura_flow() -> Any:
    words = t5_tokenizer()
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    pipe = diffusers.AuraFlowPipeline(
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vae(4, scaling_factor=0.13),
        text_encoder=t5_encoder(words),
        tokenizer=words,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def chroma(**scheduler: Any) -> Any:
    words = t5_tokenizer()
    torch.manual_seed(0)
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = diffusers.ChromaPipeline(
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 1.0, **scheduler}),
        vae=vae(4, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=t5_encoder(words),
        tokenizer=words,
    )
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def z_image(**scheduler: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    words = t5_tokenizer()
    words.chat_template = CHAT
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(words)}
    pipe = diffusers.ZImagePipeline(
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(4, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=Qwen3Model(Qwen3Config(**text)).eval(),
        tokenizer=words,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
