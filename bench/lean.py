"""What the graphs of frozen networks keep: PyTorch's own, lean ones, and blocks that are checkpointed.

    python bench/lean.py [--networks sd15 sdxl ...] [--operators 6]  # real sizes on the meta device, without memory
    python bench/lean.py --measure [--rounds 5]                      # small networks on the CPU: bytes and seconds

A row is one call of a network with a gradient of its input: the bytes that its graph keeps, the peak of the call and
its vector-Jacobian product (VJP), and both as shares of PyTorch's own. "lean" is `lean=True`, "recompute" is
`lean="recompute"`, and "blocks" has lean layers inside checkpointed blocks. "Forward again" is what is computed again,
as a share of a call's FLOPs: those of matrix products and convolutions, and on the CPU of attention. The ways are timed
in turn in one run, and a time is the smallest CPU time of the rounds. Peaks on the meta device are a little too high
where an operator is made of others there, and attention there has the memory of a fused kernel.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.cli.meta_attention import fused_attention
from doodl_fast.cli.published import PUBLISHED, SDXL_UNET, VAE
from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.diffusion.networks import has_blocks
from doodl_fast.frozen import Level, kept_by_operator

WAYS = {
    "plain": (Level.OFF, False),
    "lean": (Level.ON, False),
    "recompute": (Level.RECOMPUTE, False),
    "blocks": (Level.ON, True),
}
Network = tuple[nn.Module, Tensor, Callable[[Any, Tensor], Tensor]]
"""A network, its input, and how it is called."""
MIB = 2**20


def unet(config: dict[str, Any], size: int, dtype: torch.dtype, batch: int = 2, tokens: int = 77) -> Network:
    """A UNet of diffusers with guidance."""
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(**config).to(dtype)
    cond = torch.randn(batch, tokens, net.config.cross_attention_dim, dtype=dtype)
    options: dict[str, Any] = {}
    if net.config.addition_embed_type == "text_time":
        width = net.config.projection_class_embeddings_input_dim - 6 * net.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(batch, width, dtype=dtype), "time_ids": torch.zeros(batch, 6, dtype=dtype)}
        options["added_cond_kwargs"] = added
    timestep = torch.full((), 500, dtype=torch.int64)
    return (
        net,
        torch.randn(batch, 4, size, size, dtype=dtype),
        lambda net, x: net(x, timestep, encoder_hidden_states=cond, return_dict=False, **options)[0],
    )


def flux(layers: int, single: int, size: int, dtype: torch.dtype, tokens: int = 512, **changes: Any) -> Network:
    """A transformer in the shape of FLUX.1's; `size` is the number of patches along each side."""
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(num_layers=layers, num_single_layers=single, guidance_embeds=True, **changes)
    net, config = net.to(dtype), net.config
    given = {
        "timestep": torch.full((1,), 0.5, dtype=dtype),
        "guidance": torch.full((1,), 3.5, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, tokens, config.joint_attention_dim, dtype=dtype),
        "txt_ids": torch.zeros(tokens, 3),
        "img_ids": torch.zeros(size * size, 3),
        "return_dict": False,
    }
    return net, torch.randn(1, size * size, config.in_channels, dtype=dtype), lambda net, x: net(x, **given)[0]


def sd3(size: int, dtype: torch.dtype, tokens: int = 333, **config: Any) -> Network:
    """A transformer in the shape of Stable Diffusion 3's, with guidance."""
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(**{**SD3, "sample_size": size, **config}).to(dtype)
    given = {
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": torch.randn(2, tokens, net.config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(2, net.config.pooled_projection_dim, dtype=dtype),
        "return_dict": False,
    }
    return net, torch.randn(2, 16, size, size, dtype=dtype), lambda net, x: net(x, **given)[0]


def vae(size: int, dtype: torch.dtype, **changes: Any) -> Network:
    """The decoder of Stable Diffusion's VAE for one image."""
    from diffusers import AutoencoderKL

    net = AutoencoderKL(**{**VAE, **changes}).to(dtype)
    return net, torch.randn(1, 4, size, size, dtype=dtype), lambda net, z: net.decode(z, return_dict=False)[0]


def clip(pictures: int, dtype: torch.dtype, **changes: Any) -> Network:
    """CLIP's vision transformer, ViT-L/14 unless it is changed."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**{**CLIP, **changes}, attn_implementation="sdpa")
    net = CLIPVisionModelWithProjection(config).to(dtype)
    side = config.image_size
    return net, torch.randn(pictures, 3, side, side, dtype=dtype), lambda net, x: net(x).image_embeds


def embedded() -> Network:
    """The UNet of the pipeline that is part of this package, with guidance."""
    from doodl_fast.shapes import load_pipeline

    net = load_pipeline().unet
    cond = torch.randn(2, 16, net.config.cross_attention_dim)
    timestep = torch.full((), 500, dtype=torch.int64)
    return (
        net,
        torch.randn(2, net.config.in_channels, 16, 16),
        lambda net, x: net(x, timestep, encoder_hidden_states=cond, return_dict=False)[0],
    )


SD15_UNET = dict(PUBLISHED["sd15"].parts["unet"][1])
SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
SD35 = {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
HALF, SINGLE = torch.float16, torch.float32
REAL: dict[str, tuple[str, Callable[[], Network]]] = {
    "sd15": ("SD 1.5 UNet, 512 x 512, fp16, guided", lambda: unet(SD15_UNET, 64, HALF)),
    "sdxl": ("SDXL UNet, 1024 x 1024, fp16, guided", lambda: unet(SDXL_UNET, 128, HALF)),
    "flux": ("FLUX.1, 1024 x 1024, bf16", lambda: flux(19, 38, 64, torch.bfloat16)),
    "sd3": ("SD 3 medium, 1024 x 1024, fp16, guided", lambda: sd3(128, HALF)),
    "sd35": ("SD 3.5 medium, 1024 x 1024, fp16, guided", lambda: sd3(128, HALF, **SD35)),
    "vae": ("VAE decode, SD, 512 x 512, fp16", lambda: vae(64, HALF)),
    "vae-xl": ("VAE decode, SDXL, 1024 x 1024, fp32", lambda: vae(128, SINGLE)),
    "clip": ("CLIP ViT-L/14, 16 cutouts, fp16", lambda: clip(16, HALF)),
}
SMALL_UNET = {**SD15_UNET, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 64}
SMALL_CLIP = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
SMALL_DIT = {"num_layers": 4, "num_attention_heads": 6, "caption_projection_dim": 384, "joint_attention_dim": 256}
SMALL: dict[str, tuple[str, Callable[[], Network]]] = {
    "sd15": ("UNet of a fifth of the channels, 256 x 256, fp32, guided", lambda: unet(SMALL_UNET, 32, SINGLE)),
    "flux": (
        "FLUX.1 in small, 32 x 32 patches, fp32",
        lambda: flux(2, 4, 32, SINGLE, 64, num_attention_heads=4, attention_head_dim=64, axes_dims_rope=(8, 28, 28)),
    ),
    "sd35": (
        "SD 3.5 in small, 64 x 64 latents, fp32, guided",
        lambda: sd3(64, SINGLE, 64, **{**SD35, **SMALL_DIT, "dual_attention_layers": (0, 1)}),
    ),
    "vae": (
        "VAE decode of half the channels, 128 x 128, fp32",
        lambda: vae(16, SINGLE, block_out_channels=(64, 128, 256, 256)),
    ),
    "embedded": ("the embedded pipeline's UNet, 64 x 64, fp32, guided", embedded),
    "clip": ("CLIP in small, 8 cutouts, fp32", lambda: clip(8, SINGLE, **SMALL_CLIP)),
}


@contextmanager
def one_way(net: nn.Module, way: str) -> Iterator[Any]:
    """Yields a copy of a network that is called in one way."""
    level, blocks = WAYS[way]
    copies = ModuleCopies(net, evaluation=True, checkpoints=blocks, lean=level)
    yield copies.of(net)
    copies.release()


def sizes(network: Network, way: str, operators: bool = True) -> dict[str, Any]:
    """The bytes and the FLOPs of one call and its VJP, in one way."""
    net, given, call = network
    with one_way(net, way) as run:
        x = given.clone().requires_grad_()
        with Tracker(x.device.type) as tracker:
            output = call(run, x)
            forward, held = tracker.flops, tracker.held - output.numel() * output.element_size()
            torch.autograd.grad(output, x, torch.ones_like(output))
        found: dict[str, Any] = {
            "kept": held,
            "peak": tracker.peak,
            "forward": forward,
            "flops": tracker.flops,
        }
        if operators and not WAYS[way][1]:
            kept = kept_by_operator(call(run, x), [*net.parameters(), *net.buffers(), x])
            found["operators"] = dict(kept.most_common())
    return found


def times(network: Network, ways: list[str], rounds: int) -> dict[str, float]:
    """The smallest CPU seconds of a call and its VJP, by way, measured in turn."""
    net, given, call = network
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for way in ways:
            with one_way(net, way) as run:
                x = given.clone().requires_grad_()
                began = time.process_time()
                output = call(run, x)
                torch.autograd.grad(output, x, torch.ones_like(output))
                found[way] = min(found[way], time.process_time() - began)
    return found


def report(name: str, title: str, network: Network, args: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints one network."""
    ways = [way for way in WAYS if way != "blocks" or has_blocks(network[0])]
    rows = {way: sizes(network, way, args.operators > 0) for way in ways}
    seconds = times(network, ways, args.rounds) if args.measure else {}
    plain = rows["plain"]
    print(f"\n{title}")
    for way, row in rows.items():
        again = (row["flops"] - plain["flops"]) / max(1, plain["forward"])
        line = f"  {way:<10} kept {row['kept'] / MIB:>9.1f} MiB {row['kept'] / plain['kept']:>6.3f}"
        line += (
            f"   peak {row['peak'] / MIB:>9.1f} MiB {row['peak'] / plain['peak']:>6.3f}   forward again {again:>6.1%}"
        )
        if seconds:
            row["seconds"] = seconds[way]
            line += f"   VJP {seconds[way]:>7.3f} s {seconds[way] / seconds['plain']:>6.3f}"
        print(line, flush=True)
    for way, row in rows.items():
        largest = list(row.get("operators", {}).items())[: args.operators]
        if largest:
            print(f"    {way}: " + ", ".join(f"{key} {size / MIB:.1f}" for key, size in largest))
    return {"network": name, "title": title, "measured": args.measure, "ways": rows}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=REAL | SMALL, help="which networks; default: all")
    parser.add_argument("--measure", action="store_true", help="small networks on the CPU, with times")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed")
    parser.add_argument("--operators", type=int, default=5, help="how many operators are listed for each way")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    found = []
    table = SMALL if args.measure else REAL
    for name in args.networks or table:
        if name not in table:
            continue
        title, make = table[name]
        with (
            nullcontext() if args.measure else torch.device("meta"),
            nullcontext() if args.measure else fused_attention(),
        ):
            network = make()
            network[0].requires_grad_(False)
            found.append(report(name, title, network, args))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
