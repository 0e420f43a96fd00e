"""Which part of a UNet's work depends on the prompt or the timestep alone, so that a run could do it once.

    python bench/repeated_work.py [--models sd15,sdxl]

The keys and values of cross-attention depend on the prompt, and the embeddings of the timestep on that alone. The
script counts the floating-point operations of one guided call (a batch of 2) on the meta device, and what it would take
to keep the keys and values.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from doodl_fast.cli.published import PUBLISHED

MODELS = {"sd15": 64, "sdxl": 128}
"""The side of the latents of each published model."""
TOKENS = 77


def unet_and_inputs(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A UNet on the meta device, and the arguments of a guided call."""
    from diffusers import UNet2DConditionModel

    side, config = MODELS[name], PUBLISHED[name].parts["unet"][1]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).half().eval().requires_grad_(False)
        x = torch.empty(2, unet.config.in_channels, side, side, dtype=torch.float16)
        cond = torch.empty(2, TOKENS, unet.config.cross_attention_dim, dtype=torch.float16)
        options: dict[str, Any] = {"encoder_hidden_states": cond, "return_dict": False}
        if unet.config.addition_embed_type == "text_time":
            pooled = torch.empty(2, 1280, dtype=torch.float16)
            options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(2, 6, dtype=torch.float16)}
        timestep = torch.empty((), dtype=torch.int64)
    return unet, (x, timestep), options


def repeated(unet: nn.Module) -> dict[str, list[nn.Linear]]:
    """The linear layers whose input is the prompt alone, and those whose input is the timestep alone."""
    linear = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)}
    return {
        "prompt": [layer for name, layer in linear.items() if name.endswith(("attn2.to_k", "attn2.to_v"))],
        "timestep": [layer for name, layer in linear.items() if "time_emb" in name or "add_embedding" in name],
    }


def measure(name: str) -> dict[str, float]:
    """The share of each kind in a call's operations, and the bytes of all keys and values."""
    unet, args, options = unet_and_inputs(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*args, **options)
    rows = {"prompt": 2 * TOKENS, "timestep": 2}
    found = {
        kind: sum(2.0 * rows[kind] * layer.in_features * layer.out_features for layer in layers)
        / counter.get_total_flops()
        for kind, layers in repeated(unet).items()
    }
    kept = sum(2 * TOKENS * layer.out_features * 2 for layer in repeated(unet)["prompt"])
    return {"operations": counter.get_total_flops(), **found, "MiB kept": kept / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description="Work of a UNet that a run could do once.")
    parser.add_argument("--models", default="sd15,sdxl", help=f"of {', '.join(MODELS)}; default: %(default)s")
    args = parser.parse_args()
    print("| guided fp16 call | TFLOP | keys and values of the prompt | embeddings of the timestep | MiB to keep |")
    print("|---|---|---|---|---|")
    for name in args.models.split(","):
        found = measure(name)
        print(
            f"| {name} | {found['operations'] / 1e12:.2f} | {found['prompt']:.2%} | {found['timestep']:.2%} "
            f"| {found['MiB kept']:.1f} |"
        )


if __name__ == "__main__":
    main()
