"""Prints the errors of EDICT's gradient by the network's dtype, beside those recorded from the reference.

    python bench/gradient_error.py [--steps 10 50]

Two more tables come first. They show how much of an error comes from torch's kernels: the error of a convolution's
input gradient by its size, and the seconds of a network call with a graph and its VJP in each dtype, for this network
and for the embedded one.

All that is needed is in the repository: tests/golden holds a small UNet, a start, a loss `(out * w).sum()` and the
reference's gradients (see tests/golden/README.md). An error is |gradient - truth| / |truth| in the 2-norm. The truth is
the fp64 gradient of the same weights. For fp16 and bf16 the weights, conditions, start and w are rounded to that dtype
first; the truth of fp16 was recorded from the reference, and that of bf16 is computed here by an fp64 chain, which
agrees with recorded gradients to 1e-14. Latents are fp32, the guidance scale is 7.5, the mixing weight 0.93. The script
needs diffusers.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
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
    """The tensors of a file in tests/golden."""
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def network(dtype: torch.dtype) -> nn.Module:
    """The recorded UNet in a dtype."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**json.loads((GOLDEN / "unet_config.json").read_text()))
    unet.load_state_dict({key[5:]: value for key, value in stored("models").items() if key.startswith("unet/")})
    return unet.to(dtype).eval()


def schedule(steps: int) -> Schedule:
    """The reference's own schedule."""
    table = {key: stored("schedule")[f"reference/T{steps}/{key}"].tolist() for key in ("t", "alpha", "alpha_prev")}
    return Schedule(tuple(int(t) for t in table["t"]), tuple(table["alpha"]), tuple(table["alpha_prev"]))


def gradient(
    unet: nn.Module,
    dtype: torch.dtype,
    steps: int,
    memory: str | int = "checkpoint",
    loss_scale: float = 1.0,
    latents: torch.dtype = torch.float32,
    vjp_dtype: torch.dtype | str | None = "auto",
) -> Tensor:
    """The gradient of the loss with respect to the start, of which everything is rounded to `dtype` first."""
    conditions = (stored("models")[f"embedding_{kind}conditional"].to(dtype) for kind in ("", "un"))
    chain = EDICT(Denoiser(unet, *conditions, 7.5, vjp_dtype=vjp_dtype), schedule(steps), memory=memory)
    start, weight = (stored("chain")[name].to(dtype).to(latents) for name in ("pair", "w"))
    x, y = (half.clone().requires_grad_() for half in start.split(1))
    ((torch.cat(chain(x, y)) * weight).sum() * loss_scale).backward()
    assert x.grad is not None and y.grad is not None
    return torch.cat([x.grad, y.grad]).double() / loss_scale


def truth(name: str, steps: int) -> Tensor:
    """The fp64 gradient that the gradients of a dtype are compared with."""
    if name == "bf16":
        rounded = copy.deepcopy(network(torch.bfloat16)).double()
        return gradient(rounded, torch.bfloat16, steps, latents=torch.float64)
    return stored("chain")[f"T{steps}/" + ("fp64_fp16weights/grad" if name == "fp16" else "fp64/keep_input/grad")]


def error(got: Tensor, want: Tensor) -> float:
    """The relative error in the 2-norm."""
    return float((got.double() - want).norm() / want.norm())


def rows(steps: int, name: str) -> dict[str, list[str]]:
    """The table of a dtype: for each row its cells, one for each scale of the loss."""
    dtype, right = DTYPES[name], truth(name, steps)
    table = {}
    recorded = stored("chain").get(f"T{steps}/{name}/keep_input/grad")
    table["the reference"] = ["-" if recorded is None else f"{error(recorded, right):.2e}", "-"]

    def measured(memory: str | int, vjp_dtype: torch.dtype | str | None) -> list[str]:
        found = [gradient(network(dtype), dtype, steps, memory, s, vjp_dtype=vjp_dtype) for s in LOSS_SCALES]
        return [f"{error(got, right):.2e}" for got in found]

    for memory in MEMORIES:
        table[f"`memory={memory!r}`"] = measured(memory, "auto")
    if name != "fp32":
        table["`vjp_dtype=None`"] = measured("checkpoint", None)
        table["`vjp_dtype=torch.float32`"] = measured("checkpoint", torch.float32)
    return table


# The share of torch's kernels in the error


def convolution(dtype: torch.dtype, channels: int, size: int) -> tuple[float, float]:
    """The error of a convolution's input gradient in a dtype, and the error of the exact gradient rounded to it."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, channels, 16, 16), (channels, channels, size, size), (1, channels, 16, 16))
    operands = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    def pulled(*tensors: Tensor) -> Tensor:
        x = tensors[0].clone().requires_grad_()
        y = torch.nn.functional.conv2d(x, tensors[1], padding=size // 2)
        return torch.autograd.grad(y, x, tensors[2])[0]

    right = pulled(*(tensor.double() for tensor in operands))
    return error(pulled(*operands), right), error(right.to(dtype), right)


def seconds(unet: nn.Module, dtype: torch.dtype, repeats: int = 5) -> tuple[float, float]:
    """The least time of a call without a graph, and of one with a graph and its VJP, on a batch of 2."""
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    unet = copy.deepcopy(unet).to(dtype).requires_grad_(False)
    x, cond = torch.randn(2, 4, size, size).to(dtype).requires_grad_(), torch.randn(2, 8, width).to(dtype)
    arguments = {"timestep": torch.tensor(500), "encoder_hidden_states": cond, "return_dict": False}

    def vjp() -> None:
        y = unet(x, **arguments)[0]
        torch.autograd.grad(y, x, torch.ones_like(y))

    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for function, found in zip((torch.no_grad()(lambda: unet(x, **arguments)), vjp), times, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def kernels() -> None:
    """Prints the two tables on torch's kernels."""
    from doodl_fast import shapes

    print("| convolution's input gradient | error | rounded once |\n|---|---|---|")
    for name in ("fp16", "bf16"):
        for channels, size in ((64, 1), (16, 3), (64, 3), (256, 3), (64, 5)):
            errors = [f"{value:.1e}" for value in convolution(DTYPES[name], channels, size)]
            print(f"| {name}, {channels} channels, {size} x {size} | {' | '.join(errors)} |")
    print("\n| one call | without a graph | with its VJP | fp32's VJP, of it |\n|---|---|---|---|")
    for title, unet in (("this UNet", network(torch.float32)), ("the embedded UNet", shapes.load_pipeline().unet)):
        wide = seconds(unet, torch.float32)
        for name, dtype in DTYPES.items():
            value, vjp = wide if name == "fp32" else seconds(unet, dtype)
            print(f"| {title}, {name} | {value:.4f} s | {vjp:.4f} s | {wide[1] / vjp:.2f} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient errors of the chain, by the network's dtype.")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50], choices=(10, 20, 25, 30, 50))
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernels()
    print("| network | steps | gradient | error | error, loss times 1e-6 |\n|---|---|---|---|---|")
    for name in DTYPES:
        for steps in args.steps:
            for row, cells in rows(steps, name).items():
                print(f"| {name} | {steps} | {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
