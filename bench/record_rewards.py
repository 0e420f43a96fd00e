"""Records what the packages that define rewards compute with tiny random weights, for the tests of guidance.

    python bench/record_rewards.py hps image_reward [--out tests/golden/rewards.safetensors]

hps needs the package hpsv2, image_reward the package image-reward with a transformers before 4.40. Their code is run
unchanged, except that ImageReward's networks are made smaller. Weights, pictures, tokens and scores are stored under
the name of the reward; other rewards in the file stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "guidance")]
TEXTS = ("a red star", "a blue circle")


def spread(model: torch.nn.Module) -> None:
    """Makes weights large enough that every one of them changes the score."""
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        size = 0.3 if value.ndim > 1 else 0.1
        offset = 1.0 if value.ndim == 1 and bool((value == 1).all()) else 0.0
        value.data = offset + size * torch.randn(value.shape, generator=generator)


def of_hps(images: Tensor, wide: Tensor) -> dict[str, Tensor]:
    """The CLIP in the hpsv2 package, and its preprocessing of pictures that are not square."""
    import tiny_pipeline
    from hpsv2.src.open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from hpsv2.src.open_clip.transform import image_transform

    words = tiny_pipeline.tokenizer(Path(tempfile.mkdtemp()))
    tokens = words(list(TEXTS), padding="max_length", max_length=24, return_tensors="pt").input_ids
    ends = (tokens == words.eos_token_id).int().argmax(1, keepdim=True)
    tokens[torch.arange(24) > ends] = 0  # open_clip fills texts up with zeros
    vision = CLIPVisionCfg(layers=2, width=32, head_width=2, patch_size=8, image_size=32, mlp_ratio=1.0)
    text = CLIPTextCfg(context_length=24, vocab_size=len(words), width=16, heads=16, layers=2)
    model = CLIP(8, vision, text, output_dict=True).eval()
    spread(model)
    # Opening a file and converting it to a tensor come first.
    process = image_transform(32, is_train=False, resize_longest_max=True).transforms[2:]
    found = {f"weights/{name}": value for name, value in model.state_dict().items()}
    for name, pictures in (("images", images), ("wide", wide)):
        seen = []
        for picture in pictures / 2 + 0.5:
            for step in process:
                picture = step(picture)
            seen.append(picture)
        out = model(torch.stack(seen), tokens)
        found[name] = pictures
        found[f"{name}_score"] = torch.diagonal(out["image_features"] @ out["text_features"].T)
    return found


def of_image_reward(images: Tensor, _: Tensor) -> dict[str, Tensor]:
    """ImageReward with two layers in each network, and a head of narrow layers."""
    from bert_words import WORDS, bert_words
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain, vit

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 12, "hidden_size": 24, "intermediate_size": 48}
    settings = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 36, "add_cross_attention": True}
    settings |= {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "add_type_embeddings": False, "pad_token_id": 0}
    file = Path(tempfile.mkdtemp()) / "med_config.json"
    file.write_text(json.dumps(settings))
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 16, "mlp_ratio": 1.0}
    blip_pretrain.create_vit = lambda *_: (vit.VisionTransformer(**small), 32)
    blip_pretrain.init_tokenizer = bert_words
    model = ImageReward(str(file))
    widths = (24, 8, 6, 4, 3, 1)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Dropout(0.1))]
    model.mlp.layers = nn.Sequential(*layers[:7], layers[8])  # no dropout between the last two
    spread(model.eval())
    mean, std = (torch.tensor(getattr(model.preprocess.transforms[-1], name)) for name in ("mean", "std"))
    tokens = model.blip.tokenizer(
        list(TEXTS), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    pixels = (images / 2 + 0.5 - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    score = model.score_gard(tokens.input_ids, tokens.attention_mask, pixels).squeeze(1)
    found = {f"weights/{name}": value for name, value in model.state_dict().items()}
    return {**found, "images": images, "images_score": score}


RECORDERS = {"hps": of_hps, "image_reward": of_image_reward}


def main() -> None:
    """Records everything and writes it to one file."""
    from conftest import smooth_pictures

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="+", choices=RECORDERS)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "rewards.safetensors")
    args = parser.parse_args()
    images, wide = smooth_pictures(2, 32, 32).clamp(-0.95, 0.95), smooth_pictures(2, 24, 50).clamp(-0.95, 0.95)
    found = load_file(args.out) if args.out.is_file() else {}
    for reward in args.rewards:
        found = {name: value for name, value in found.items() if not name.startswith(f"{reward}/")}
        with torch.no_grad():
            found |= {f"{reward}/{name}": value for name, value in RECORDERS[reward](images, wide).items()}
    save_file({name: value.contiguous().clone() for name, value in found.items()}, args.out)
    for name, value in found.items():
        if "weights" not in name:
            print(name, tuple(value.shape), value.flatten()[:4].tolist())


if __name__ == "__main__":
    main()
