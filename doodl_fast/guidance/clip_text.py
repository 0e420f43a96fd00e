"""`ClipText`: guidance to a text by CLIP (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.module_copies import frozen_copy
from .clip import ClipGuide, load_clip, projected


class ClipText(ClipGuide):
    """The distance between pictures and a text in CLIP's embedding, as a mean over pictures and cutouts.

    Args:
        model: A transformers CLIPModel, in any dtype.
        processor: Its processor, or its tokenizer alone.
        prompt: The text. What exceeds the length that the model reads is cut off.
        num_cutouts: See `ClipGuide`.
        cut_power: See `ClipGuide`.
        lean: See `ClipGuide`.

    Raises:
        TypeError: `model` is no CLIPModel, or `processor` has no tokenizer.
        ValueError: `prompt` is empty, or another argument is out of range.

    Example:
        >>> loss = ClipText.from_pretrained("openai/clip-vit-base-patch32", "a dog with a hat")
        >>> loss(images).backward()
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: str,
        num_cutouts: int = 0,
        cut_power: float = 0.3,
        lean: bool | str = True,
    ) -> None:
        super().__init__(model, processor, num_cutouts, cut_power, lean)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt: expected a text to guide to, got {prompt!r}")
        tokenizer: Callable[..., Any] | None = getattr(processor, "tokenizer", processor)
        if not callable(tokenizer) or not hasattr(tokenizer, "model_max_length"):
            raise TypeError(f"processor: expected a CLIPProcessor or a tokenizer, got {type(processor).__name__}")
        length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        tokens = tokenizer([prompt], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with frozen_copy(model) as frozen, torch.no_grad():
            embedded: Tensor = projected(frozen.get_text_features(input_ids=tokens.input_ids.to(model.device)))
        self.prompt = prompt
        self.target = F.normalize(embedded.to(torch.promote_types(embedded.dtype, torch.float32)), dim=-1)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        prompt: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> ClipText:
        """Loads the model from a folder or a hub id.

        Args:
            source: The folder or the hub id.
            prompt: The text.
            device: Where the model is put.
            dtype: The dtype of its weights.
            **options: `num_cutouts` and `cut_power`.

        Raises:
            ValueError: There is no such model, it lacks weights, or an argument is out of range.
        """
        model, processor = load_clip(source, device, dtype)
        return cls(model, processor, prompt, **options)
