"""`TextScore` and `PickScore`: how well pictures fit texts, by a CLIP or a SigLIP of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.module_copies import frozen_copy
from .arguments import check_texts, checked_prompt
from .clip import ClipGuide, load_clip, projected
from .cutouts import check_images


class TextScore(ClipGuide):
    """Minus the score that a CLIP or SigLIP model gives to pictures for texts, as a mean over pictures.

    The score is the model's logit: the cosine of both embeddings times its learned scale, plus its bias if it has one.

    Args:
        model: A transformers CLIPModel or SiglipModel (which SigLIP 2 of a fixed resolution is too), or a
            Siglip2Model (SigLIP 2 NaFlex), in any dtype.
        processor: Its processor, whose tokenizer, mean, deviation and way of resizing are taken.
        prompt: One text for all pictures, or one for each.
        lean: See `ClipGuide`.

    Raises:
        TypeError: `model` is no such model, or `processor` has no tokenizer.
        ValueError: `prompt` is empty.

    Example:
        >>> loss = TextScore.from_pretrained("google/siglip-base-patch16-224", "a dog with a hat")
        >>> loss(images).backward()
    """

    def __init__(self, model: Any, processor: Any, prompt: str | Sequence[str], lean: bool | str = True) -> None:
        super().__init__(model, processor, lean=lean)
        if not callable(getattr(model, "get_text_features", None)):
            raise TypeError(f"model: expected a transformers CLIPModel or SiglipModel, got {type(model).__name__}")
        self.prompt, texts = checked_prompt(prompt)
        tokenizer: Callable[..., Any] | None = getattr(processor, "tokenizer", processor)
        if not callable(tokenizer) or not hasattr(tokenizer, "model_max_length"):
            raise TypeError(f"processor: expected one with a tokenizer, got {type(processor).__name__}")
        longest = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        with frozen_copy(model) as frozen, torch.no_grad():
            embedded = projected(frozen.get_text_features(input_ids=tokens.input_ids.to(model.device)))
            wide = torch.promote_types(embedded.dtype, torch.float32)
            self.target = F.normalize(embedded.to(wide), dim=-1)
            self.scale = float(model.logit_scale.detach().to(wide).exp())
            bias = getattr(model, "logit_bias", None)
            self.bias = 0.0 if bias is None else float(bias)

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of images (B, 3, H, W) in [-1, 1]."""
        return -self.scores(images).mean()

    def scores(self, images: Tensor) -> Tensor:
        """Computes the scores (B,) of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: There are several texts, and not as many as pictures.
        """
        check_texts(len(self.target), len(check_images(images)))
        features = F.normalize(self.look(images), dim=-1)
        return self.scale * (features * self.target.to(features)).sum(-1) + self.bias

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        prompt: str | Sequence[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        processor: str | Path | None = None,
        **options: Any,
    ) -> TextScore:
        """Loads the model from safetensors files.

        Args:
            source: The folder or the hub id of a CLIP or a SigLIP.
            prompt: One text for all pictures, or one for each.
            device: Where the model is put.
            dtype: The dtype of its weights.
            processor: The folder or the hub id of the processor, if it is not that of the model.
            **options: `lean`.

        Raises:
            ValueError: There is no such model, it lacks weights, or an argument is out of range.
        """
        return cls(*load_clip(source, device, dtype, processor), prompt, **options)


class PickScore(TextScore):
    """Minus the PickScore of pictures for texts (Kirstain et al., arXiv 2305.01569), a CLIP trained on preferences.

    It has the arguments of `TextScore`. The published model is "yuvalkirstain/PickScore_v1", and its processor is that
    of "laion/CLIP-ViT-H-14-laion2B-s32B-b79K".

    Example:
        >>> loss = PickScore.from_pretrained(
        ...     "yuvalkirstain/PickScore_v1", "a dog", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        ... )
    """
