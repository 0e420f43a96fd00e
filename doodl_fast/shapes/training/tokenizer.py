"""The tokenizer of the embedded pipeline: one token for each word of the captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..scenes import COLOURS, RELATIONS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_TOKENS = 16


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Builds a byte-level CLIP tokenizer in which every word of the captions is one token.

    Args:
        folder: Where the tokenizer's files are written.

    Raises:
        RuntimeError: A word became several tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = ["a", *COLOURS, *SHAPES, *" ".join(RELATIONS).split(), "picture", "photo", "and", "the"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    # Without ids from the beginning, the trainer assigns them in a random order, which decides between merges that are
    # equally frequent.
    endings = [letter + "</w>" for letter in sorted(set("".join(words)))]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", special_tokens=endings, show_progress=False
    )
    bpe.train_from_iterator(words * 4, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = (
        alphabet + [s + "</w>" for s in alphabet] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(dict.fromkeys(symbols))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    built = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)
    for word in words:
        if len(built(word).input_ids) != 3:
            raise RuntimeError(f"tokenizer: {word!r} is not one token: {built.tokenize(word)}")
    return built


def tokens(tokenizer: Any, captions: list[str]) -> Tensor:
    """Returns the token ids of captions, padded to `MAX_TOKENS`: of shape (N, MAX_TOKENS), int64."""
    return torch.tensor(tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS).input_ids)
