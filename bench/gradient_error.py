"""Errors of EDICT's gradient by network dtype, beside those recorded from the reference; prints a markdown table.

    python bench/gradient_error.py [--steps 10 50]

Everything is in the clone: tests/golden holds a small UNet, a start, a loss `(out * w).sum()` and the reference's
gradients (tests/golden/README.md). An error is |gradient - truth| / |truth| in the 2-norm. The truth is the fp64
gradient of the same weights: for fp16 and bf16 the rounded ones, as are conditions, start and w (for fp16 recorded from
the reference; for bf16 made here with an fp64 chain, which agrees with the recorded one to 1e-14). Latents are fp32,
guidance 7.5, mixing 0.93. Needs diffusers.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from doodl_fast import EDICT, Denoiser, Schedule

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MEMORIES: tuple[str | int, ...] = ("checkpoint", 10, "reversible")
LOSS_SCALES = (1.0, 1e-6)


@cache
def stored(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def network(dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**json.loads((GOLDEN / "unet_config.json").read_text()))
    unet.load_state_dict({key[5:]: value for key, value in stored("models").items() if key.startswith("unet/")})
    return unet.to(dtype).eval()


def schedule(steps: int) -> Schedule:
    """The reference's own."""
    table = {key: stored("schedule")[f"reference/T{steps}/{key}"].tolist() for key in ("t", "alpha", "alpha_prev")}
    return Schedule(tuple(int(t) for t in table["t"]), tuple(table["alpha"]), tuple(table["alpha_prev"]))


def gradient(
    unet: nn.Module,
    dtype: torch.dtype,
    steps: int,
    memory: str | int = "checkpoint",
    loss_scale: float = 1.0,
    latents: torch.dtype = torch.float32,
    vjp_dtype: torch.dtype | None = None,
) -> Tensor:
    """Of the loss with respect to the start; everything that goes in is rounded to `dtype` first."""
    conditions = (stored("models")[f"embedding_{kind}conditional"].to(dtype) for kind in ("", "un"))
    chain = EDICT(Denoiser(unet, *conditions, 7.5, vjp_dtype=vjp_dtype), schedule(steps), memory=memory)
    start, weight = (stored("chain")[name].to(dtype).to(latents) for name in ("pair", "w"))
    x, y = (half.clone().requires_grad_() for half in start.split(1))
    ((torch.cat(chain(x, y)) * weight).sum() * loss_scale).backward()
    assert x.grad is not None and y.grad is not None
    return torch.cat([x.grad, y.grad]).double() / loss_scale


def truth(name: str, steps: int) -> Tensor:
    if name == "bf16":
        rounded = copy.deepcopy(network(torch.bfloat16)).double()
        return gradient(rounded, torch.bfloat16, steps, latents=torch.float64)
    return stored("chain")[f"T{steps}/" + ("fp64_fp16weights/grad" if name == "fp16" else "fp64/keep_input/grad")]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def rows(steps: int, name: str) -> dict[str, list[str]]:
    """Cells by row, one a loss scale."""
    dtype, right = DTYPES[name], truth(name, steps)
    table = {}
    recorded = stored("chain").get(f"T{steps}/{name}/keep_input/grad")
    table["the reference"] = ["-" if recorded is None else f"{error(recorded, right):.2e}", "-"]
    for memory in MEMORIES:
        found = [error(gradient(network(dtype), dtype, steps, memory, s), right) for s in LOSS_SCALES]
        table[f"`memory={memory!r}`"] = [f"{value:.2e}" for value in found]
    if name != "fp32":
        found = [
            error(gradient(network(dtype), dtype, steps, "checkpoint", s, vjp_dtype=torch.float32), right)
            for s in LOSS_SCALES
        ]
        table["`vjp_dtype=torch.float32`"] = [f"{value:.2e}" for value in found]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient errors of the chain, by the network's dtype.")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50], choices=(10, 20, 25, 30, 50))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | steps | gradient | error | error, loss times 1e-6 |\n|---|---|---|---|---|")
    for name in DTYPES:
        for steps in args.steps:
            for row, cells in rows(steps, name).items():
                print(f"| {name} | {steps} | {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
