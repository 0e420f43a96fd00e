"""`ImageReward`: how much people like pictures for texts, by a BLIP (Xu et al., arXiv 2304.05977)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.module_copies import frozen_copy
from ..diffusion.networks import run_in_dtype
from ..frozen import level_of
from .aesthetic import linear_head
from .arguments import check_texts, checked_prompt
from .clip import CLIP_MEAN, CLIP_STD
from .cutouts import check_images, normalized, resize_and_crop, unit_range
from .model_loading import load_model, load_words, read_tensors

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""The mean and the deviation of the network's scores over the pictures that it was trained on."""
WORDS = 35
"""The tokens of a text. What exceeds them is cut off."""
HEADS = {"vision": 16, "text": 12}
"""The attention heads in each layer of BLIP's large vision transformer and of its BERT."""
TOKENIZER = "google-bert/bert-base-uncased"
EXPECTED = "the weights of ImageReward"
RENAMED = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
"""Parts of the names of weights in BLIP's vision transformer, and what transformers has in their place."""


class ImageRewardNetwork(nn.Module):
    """The network of ImageReward: BLIP's text encoder, which looks at the picture, and a linear layer on one token.

    Args:
        vision: A transformers BlipVisionModel.
        text: A transformers BlipTextModel with cross-attention.
        head: A linear layer from the features of `text` to one score.
    """

    def __init__(self, vision: Any, text: Any, head: nn.Linear) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns the scores (B,) of normalised pictures (B, 3, size, size) for tokens and their mask (B, length)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        output = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen)
        scores: Tensor = self.head(output.last_hidden_state[:, 0])
        return (scores.squeeze(-1) - MEAN) / STD


def load_image_reward(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ImageRewardNetwork:
    """Loads the weights of ImageReward into transformers' BLIP. Code in a pickle is never run.

    The projections "vision_proj" and "text_proj" in the file are of no use for the score and are left out.

    Args:
        source: The published file, "ImageReward.pt" of the repository "THUDM/ImageReward", or its state dict in a
            .safetensors file.
        device: Where the network is put.
        dtype: The dtype of its weights.

    Raises:
        ValueError: The file cannot be read, or holds other weights.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    state = read_tensors(source, "guidance model", EXPECTED)
    seeing = _part(state, "blip.visual_encoder.", source)
    reading = _part(state, "blip.text_encoder.", source)
    reading.pop("embeddings.position_ids", None)  # the numbers 0, 1, 2, ..., which transformers does not store
    patches, width = seeing["pos_embed"].shape[1:]
    patch = seeing["patch_embed.proj.weight"].shape[-1]
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(seeing["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in seeing),
        num_attention_heads=HEADS["vision"],
        image_size=round((patches - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    words = reading["embeddings.word_embeddings.weight"]
    text_config = BlipTextConfig(
        vocab_size=len(words),
        hidden_size=words.shape[1],
        encoder_hidden_size=width,
        intermediate_size=len(reading["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=sum(name.endswith(".intermediate.dense.bias") for name in reading),
        num_attention_heads=HEADS["text"],
        max_position_embeddings=len(reading["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        # The special tokens are those of the tokenizer; the model itself generates nothing.
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    vision, _ = load_model(BlipVisionModel, source, dtype, vision_config, {_renamed(k): v for k, v in seeing.items()})
    text, _ = load_model(BlipTextModel, source, dtype, text_config, reading, add_pooling_layer=False)
    head = linear_head(_part(state, "mlp.", source), source)
    return ImageRewardNetwork(vision, text, head).to(device, dtype).eval()


def _part(state: dict[str, Tensor], prefix: str, source: str | Path) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, without it."""
    found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"guidance model: expected {EXPECTED} in {str(source)!r}, got no {prefix}* in it")
    return found


def _renamed(name: str) -> str:
    """The name that transformers gives to a weight of BLIP's vision transformer."""
    if name.startswith("norm."):
        return f"post_layernorm.{name[5:]}"
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def load_tokenizer(source: str | Path = TOKENIZER) -> Any:
    """Loads the tokenizer of a folder or a hub id. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    return load_words(AutoTokenizer, source)


class ImageReward:
    """Minus the ImageReward of pictures for texts, as a mean over pictures.

    As in the package of its authors, pictures are resized and cropped to a square, and scores have the mean 0 and the
    deviation 1 over their data.

    Args:
        network: See `load_image_reward`.
        tokenizer: That of BERT's uncased vocabulary.
        prompt: One text for all pictures, or one for each.
        lean: Whether graphs keep no more than the gradient needs, to the same bits (docs/lean.md).

    Raises:
        TypeError: `network` or `tokenizer` is something else.
        ValueError: `prompt` is empty.

    Example:
        >>> loss = ImageReward.from_pretrained("ImageReward.pt", "a dog with a hat")
        >>> loss(images).backward()
    """

    def __init__(self, network: Any, tokenizer: Any, prompt: str | Sequence[str], lean: bool | str = True) -> None:
        if not isinstance(network, ImageRewardNetwork):
            raise TypeError(f"network: expected that of load_image_reward, got {type(network).__name__}")
        if not callable(tokenizer):
            raise TypeError(f"tokenizer: expected that of BERT, got {type(tokenizer).__name__}")
        self.prompt, texts = checked_prompt(prompt)
        self.network, self.lean = network, level_of(lean)
        self.size = int(network.vision.config.image_size)
        made = tokenizer(texts, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt")
        self.tokens, self.mask = made.input_ids, made.attention_mask

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of images (B, 3, H, W) in [-1, 1]."""
        return -self.scores(images).mean()

    def scores(self, images: Tensor) -> Tensor:
        """Computes the scores (B,) of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: There are several texts, and not as many as pictures.
        """
        count = len(check_images(images))
        check_texts(len(self.tokens), count)
        pixels = normalized(resize_and_crop(unit_range(images), self.size), CLIP_MEAN, CLIP_STD)
        tokens, mask = (value.to(images.device).expand(count, -1) for value in (self.tokens, self.mask))

        def run(x: Tensor) -> Tensor:
            with frozen_copy(self.network, lean=self.lean) as network:
                scores: Tensor = network(x, tokens, mask)
            return scores

        return run_in_dtype(run, pixels, self.network.head.weight.dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        prompt: str | Sequence[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        processor: str | Path = TOKENIZER,
        **options: Any,
    ) -> ImageReward:
        """Loads the network and the tokenizer.

        Args:
            source: The file, see `load_image_reward`.
            prompt: One text for all pictures, or one for each.
            device: Where the network is put.
            dtype: The dtype of its weights.
            processor: The folder or the hub id of the tokenizer.
            **options: `lean`.

        Raises:
            ValueError: There is no such file or tokenizer, weights are missing, or an argument is out of range.
        """
        tokenizer = load_tokenizer(processor)
        return cls(load_image_reward(source, device, dtype), tokenizer, prompt, **options)
