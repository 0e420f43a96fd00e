"""Tiny pipelines that make audio, with random weights that matter, made of the classes' own configurations."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import diffusers
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from tiny_families import awake, t5_encoder, t5_tokenizer


def cosine_scheduler() -> Any:
    """The class of Stable Audio's scheduler. Its module imports torchsde, which only its own noise needs."""
    name = "torchsde"
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)
    try:
        module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    finally:
        if sys.modules[name].__spec__ is None:
            del sys.modules[name]
    return module.CosineDPMSolverMultistepScheduler


def euler_scheduler() -> Any:
    """The noise levels of Stable Audio's scheduler, and the steps without noise of diffusers' EDMEulerScheduler."""
    return type("Euler", (cosine_scheduler(),), {"step": diffusers.EDMEulerScheduler.step})()


def tokenizers() -> tuple[Any, Any]:
    """The two tokenizers of AudioLDM 2, of the classes by which its pipeline knows them."""
    from tokenizers import pre_tokenizers
    from transformers import RobertaTokenizer, T5Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁dog", "▁cat", "▁ugly", "▁blurred"]
    t5 = T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=8)
    return RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=16), t5


def clap(words: Any) -> Any:
    from transformers import ClapConfig, ClapModel

    text = {
        "vocab_size": len(words),
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
        "projection_dim": 16,
        "pad_token_id": words.pad_token_id,
    }
    audio = {
        "patch_embeds_hidden_size": 8,
        "hidden_size": 8,
        "projection_dim": 16,
        "num_mel_bins": 8,
        "spec_size": 16,
        "patch_size": 4,
        "patch_stride": 4,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "window_size": 2,
    }
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16)).eval()


def vocoder() -> Any:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    made = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=1600,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            normalize_before=False,
        )
    )
    return awake(made, 0.1)


def audioldm2(scheduler: Any = None) -> Any:
    from transformers import ClapFeatureExtractor, GPT2Config, GPT2LMHeadModel

    words, t5_words = tokenizers()
    torch.manual_seed(0)
    unet = AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, 32), (None, 16, 32)),
        attention_head_dim=4,
    )
    torch.manual_seed(4)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 16],
        in_channels=1,
        out_channels=1,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        scaling_factor=0.7,
    )
    language = GPT2Config(
        n_embd=16, n_head=2, n_layer=1, vocab_size=16, n_positions=64, max_new_tokens=4, bos_token_id=0, eos_token_id=0
    )
    pipe = diffusers.AudioLDM2Pipeline(
        vae=vae.eval(),
        text_encoder=clap(words),
        text_encoder_2=t5_encoder(t5_words),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=16),
        language_model=GPT2LMHeadModel(language).eval(),
        tokenizer=words,
        tokenizer_2=t5_words,
        feature_extractor=ClapFeatureExtractor(),
        unet=awake(unet),
        scheduler=diffusers.DDIMScheduler(clip_sample=False) if scheduler is None else scheduler,
        vocoder=vocoder(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_audio(scheduler: Any = None) -> Any:
    words = t5_tokenizer()
    words.model_max_length = 8
    torch.manual_seed(0)
    transformer = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    torch.manual_seed(4)
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32)
    pipe = diffusers.StableAudioPipeline(
        vae=vae.eval(),
        text_encoder=t5_encoder(words),
        projection_model=awake(projection),
        tokenizer=words,
        transformer=awake(transformer),
        scheduler=cosine_scheduler()() if scheduler is None else scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
