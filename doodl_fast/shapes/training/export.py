"""Writes what the stages trained in the file formats of diffusers and transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from . import models
from .data import Pictures
from .stages import latents, train_classifier, train_clip, train_text, train_unet, train_vae
from .tokenizer import make_tokenizer


def export(work: Path, out: Path, data: Pictures) -> None:
    """Writes the pipeline, the CLIP model and the classifier as fp16 safetensors.

    Args:
        work: The folder of the checkpoints. A stage that is not finished is trained first.
        out: Where the folders "pipeline", "clip" and "classifier" are written.
        data: The training pictures.
    """
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPProcessor

    vae = train_vae(work, data)
    _, factor = latents(work, vae, data)
    vae.register_to_config(scaling_factor=factor)  # type: ignore[operator]
    tokenizer = make_tokenizer(work / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=train_text(work).text_encoder,
        tokenizer=tokenizer,
        unet=train_unet(work, data, vae),
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out / "pipeline", safe_serialization=True)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    train_clip(work, data).half().save_pretrained(out / "clip")  # type: ignore[operator]
    CLIPProcessor(processor, tokenizer).save_pretrained(out / "clip")
    train_classifier(work, data).half().save_pretrained(out / "classifier")  # type: ignore[operator]
    processor.save_pretrained(out / "classifier")
