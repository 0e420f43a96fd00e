"""`HPSv2`: human preference scores of pictures for texts, by the CLIP of HPSv2 (Wu et al., arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clip import load_clip
from .model_loading import load_model, load_words, read_tensors
from .text_score import TextScore

HEADS = 16
"""The attention heads in each layer of ViT-H-14, of its vision and of its text encoder."""
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
OPEN_CLIP = "the weights of an open_clip CLIP, as open_clip names them"
RENAMED = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
"""The beginnings of open_clip's names, and what transformers has in their place."""
IN_LAYERS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def open_clip_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives open_clip's weights of a CLIP with a vision transformer the names and shapes of a transformers CLIPModel.

    Args:
        state: The weights by open_clip's names.

    Returns:
        The weights by transformers' names. Weights of names that are not known keep them.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        begin = next((old for old in RENAMED if name == old or name.startswith(f"{old}.")), None)
        new = name if begin is None else RENAMED[begin] + name[len(begin) :]
        for old, part in IN_LAYERS.items():
            new = new.replace(old, part)
        if ".attn.in_proj_" in new:  # queries, keys and values in one matrix
            layer, _, kind = new.partition(".attn.in_proj_")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[f"{layer}.self_attn.{part}_proj.{kind}"] = rows
        elif name in ("visual.proj", "text_projection"):  # open_clip multiplies by them from the right
            found[f"{'visual_projection' if name == 'visual.proj' else name}.weight"] = value.T.contiguous()
        else:
            found[new] = value
    return found


def load_open_clip_file(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Loads open_clip's ViT-H-14, or a CLIP that differs from it in its sizes alone, as a transformers CLIPModel.

    Sizes are read from the shapes of the weights. open_clip itself is not needed.

    Args:
        source: A .safetensors file, or a .pt file of a state dict, which is read with `weights_only=True`.
        device: Where the model is put.
        dtype: The dtype of its weights.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: The file cannot be read, or holds other weights than those of such a CLIP.
    """
    from transformers import CLIPConfig, CLIPModel

    state = read_tensors(source, "guidance model", OPEN_CLIP)
    needed: tuple[str, ...] = (
        "token_embedding.weight",
        "positional_embedding",
        "text_projection",
        "visual.conv1.weight",
    )
    needed += ("visual.positional_embedding", "visual.transformer.resblocks.0.mlp.c_fc.weight")
    missing = [name for name in (*needed, "transformer.resblocks.0.mlp.c_fc.weight") if name not in state]
    if missing:
        raise ValueError(
            f"guidance model: expected {OPEN_CLIP}, in {str(source)!r}, which lacks {', '.join(map(repr, missing))}; a "
            "folder is loaded as a transformers CLIPModel"
        )
    words, width = state["token_embedding.weight"].shape
    patches, patch = len(state["visual.positional_embedding"]) - 1, state["visual.conv1.weight"].shape[-1]
    parts = {"visual.transformer": state["visual.conv1.weight"].shape[0], "transformer": width}
    text, vision = (
        {
            "hidden_size": size,
            "intermediate_size": len(state[f"{part}.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": sum(n.startswith(f"{part}.") and n.endswith(".mlp.c_fc.weight") for n in state),
            "num_attention_heads": HEADS,
            "hidden_act": "gelu",
        }
        for part, size in sorted(parts.items())
    )
    text |= {"vocab_size": words, "max_position_embeddings": len(state["positional_embedding"])}
    text |= {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}  # the last two words
    vision |= {"image_size": round(patches**0.5) * patch, "patch_size": patch}
    size = state["text_projection"].shape[1]
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=size)
    return load_model(CLIPModel, source, dtype, config, open_clip_weights(state))[0].to(device)


def load_hpsv2(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    processor: str | Path | None = None,
) -> tuple[Any, Any]:
    """Loads the model of HPSv2 and its processor; see `HPSv2.from_pretrained`."""
    if not Path(source).expanduser().is_file():
        return load_clip(source, device, dtype, processor)
    from transformers import AutoProcessor

    words = load_words(AutoProcessor, processor or PROCESSOR)
    return load_open_clip_file(source, device, dtype), words


class HPSv2(TextScore):
    """Minus the HPSv2 score of pictures for texts: the cosine of both embeddings by a CLIP trained on preferences.

    It has the arguments of `TextScore`. As in the hpsv2 package, the longer side of pictures is resized, and black is
    added to the shorter one.

    Example:
        >>> loss = HPSv2.from_pretrained("HPS_v2.1_compressed.pt", "a dog with a hat")
        >>> loss(images).backward()
    """

    def __init__(self, model: Any, processor: Any, prompt: str | Sequence[str], lean: bool | str = True) -> None:
        super().__init__(model, processor, prompt, lean)
        self.scale, self.bias, self.fit = 1.0, 0.0, "pad"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        prompt: str | Sequence[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        processor: str | Path | None = None,
        **options: Any,
    ) -> HPSv2:
        """Loads the model.

        Args:
            source: The published file, "HPS_v2_compressed.pt" or "HPS_v2.1_compressed.pt" of the repository
                "xswu/HPSv2", whose weights become those of a transformers CLIPModel; or the folder or the hub id of
                such a model.
            prompt: One text for all pictures, or one for each.
            device: Where the model is put.
            dtype: The dtype of its weights.
            processor: The folder or the hub id of the processor; by default that of the model, and for a file that of
                "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", from which HPSv2 was trained.
            **options: `lean`.

        Raises:
            ValueError: There is no such model, it lacks weights, or an argument is out of range.
        """
        return cls(*load_hpsv2(source, device, dtype, processor), prompt, **options)
