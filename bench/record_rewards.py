"""Records what the packages that define rewards compute with tiny random weights, for the tests of guidance.

    pip install --no-deps hpsv2
    python bench/record_rewards.py [--out tests/golden/rewards.safetensors]

Their code is run unchanged. Weights, pictures, tokens and scores are stored under the name of the reward.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
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


def main() -> None:
    """Records everything and writes it to one file."""
    from conftest import smooth_pictures

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "rewards.safetensors")
    args = parser.parse_args()
    images, wide = smooth_pictures(2, 32, 32).clamp(-0.95, 0.95), smooth_pictures(2, 24, 50).clamp(-0.95, 0.95)
    with torch.no_grad():
        found = {f"hps/{name}": value for name, value in of_hps(images, wide).items()}
    save_file({name: value.contiguous().clone() for name, value in found.items()}, args.out)
    for name, value in found.items():
        if "weights" not in name:
            print(name, tuple(value.shape), value.flatten()[:4].tolist())


if __name__ == "__main__":
    main()
