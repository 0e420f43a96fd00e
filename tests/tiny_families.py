"""Tiny pipelines of the other families, with random weights that matter, made of the classes' own configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import tiny_pipeline
import torch
from torch import nn

TOKENS = 8


def t5_tokenizer() -> Any:
    """A fast tokenizer in which every word of a few is a token, with T5's padding and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "dog", "cat", "ugly", "blurred", "red", "circle"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def t5_encoder(words: Any, width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def vae(channels: int, **changes: Any) -> Any:
    torch.manual_seed(4)
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        **changes,
    ).eval()


def awake(network: nn.Module, scale: float = 0.3) -> nn.Module:
    """Gives every weight that its class initialises to zero, or nearly so, a random value."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.numel() == 1 or weight.std() < 0.05:
                weight.add_(torch.randn(weight.shape, generator=generator) * scale)
    return network.eval()


def stable_diffusion_3(work: Path, **scheduler: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    words, t5_words = tiny_pipeline.tokenizer(work), t5_tokenizer()
    torch.manual_seed(0)
    config = CLIPTextConfig(**tiny_pipeline.text_settings(words, num_hidden_layers=2))
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **scheduler),
        vae=vae(4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        text_encoder_3=t5_encoder(t5_words),
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=t5_words,
    )


def flux(work: Path, guidance_embeds: bool = True) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    words, t5_words = tiny_pipeline.tokenizer(work), t5_tokenizer()
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = diffusers.FluxPipeline(
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
        ),
        vae=vae(4, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=CLIPTextModel(CLIPTextConfig(**tiny_pipeline.text_settings(words))).eval(),
        text_encoder_2=t5_encoder(t5_words),
        tokenizer=words,
        tokenizer_2=t5_words,
    )
    pipe.default_sample_size = 8
    return pipe


def pixart(kind: str = "PixArtSigmaPipeline", is_told: bool = False, sample_size: int = 8) -> Any:
    words = t5_tokenizer()
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=is_told,
    )
    return getattr(diffusers, kind)(
        transformer=awake(transformer),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vae=vae(4, scaling_factor=0.13),
        text_encoder=t5_encoder(words),
        tokenizer=words,
    )


def pixel_space(kind: str, scheduler: Any = None, channels: int = 3, **changes: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        **changes,
    )
    own = diffusers.DDIMScheduler(clip_sample=False) if scheduler is None else scheduler
    return getattr(diffusers, kind)(unet.eval(), own)


def deepfloyd_if(scheduler: Any = None, **changes: Any) -> Any:
    words = t5_tokenizer()
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "in_channels": 3,
        "out_channels": 6,
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
        "encoder_hid_dim": 32,
        "attention_head_dim": 8,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    }
    unet = awake(diffusers.UNet2DConditionModel(**settings | changes))
    # The pipeline reads variance_type, which DDIMScheduler has not but keeps.
    own = diffusers.DDIMScheduler.from_config({"clip_sample": False, "variance_type": "fixed_small"})
    return diffusers.IFPipeline(
        tokenizer=words,
        text_encoder=t5_encoder(words),
        unet=unet,
        scheduler=own if scheduler is None else scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
