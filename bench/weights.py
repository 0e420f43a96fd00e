"""How much memory the gradient of a LoRA takes, by the number of sampling steps and by what the chain keeps.

    python bench/weights.py
    python bench/weights.py --steps 10 50 100 --solvers EDICT

Memory is counted by PyTorch's dispatcher (`doodl_fast.chain.memory.tracker.Tracker`), so that the numbers are the same
on every machine: the largest sum of all tensors that were alive at one time, above those that were there before. Each
weight has one buffer, whatever the number of steps. Stored latents do grow with the steps: "checkpoint" keeps one for
each call, and plain autograd ("naive") the graph of each call. The script checks that the gradient at the smallest
number of steps is that of plain autograd.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from doodl_fast import DDIM, EDICT, shapes
from doodl_fast.chain.memory.plan import format_bytes
from doodl_fast.chain.memory.tracker import Tracker

SOLVERS = {"EDICT": EDICT, "DDIM": DDIM}


class LowRank(nn.Module):
    """Adds the product of two thin matrices to a weight."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], generator=generator).to(weight) / 10)
        self.up = nn.Parameter(torch.randn(weight.shape[0], rank, generator=generator).to(weight) / 10)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_lora(network: nn.Module, rank: int) -> None:
    """Adds a LoRA to the projections of attention. No other weight requires grad."""
    network.requires_grad_(False)
    for name, layer in list(network.named_modules()):
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
            layer.parametrizations.weight.original.requires_grad_(False)


def measure(solver: str, steps: int, memory: str, rank: int) -> tuple[int, list[Tensor]]:
    """The peak of a gradient through the embedded pipeline in bytes, and the gradient of each weight."""
    pipe = shapes.load_pipeline()
    add_lora(pipe.unet.double(), rank)
    options: dict[str, Any] = {"num_inference_steps": steps, "trainable": True, "memory": memory}
    chain = SOLVERS[solver].from_pipeline(pipe, "a red circle", guidance_scale=3.0, **options)
    noise = chain.noise(seed=0).double()
    weights = list(chain.denoiser.trainable)
    with Tracker() as tracker:
        found = torch.autograd.grad(chain(noise)[0].square().mean(), weights)
    return tracker.peak, list(found)


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative difference of a weight's gradient."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def main(argv: list[str] | None = None) -> dict[tuple[str, str, int], int]:
    """Prints a table. Returns the peaks by solver, memory and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument(
        "--memory", nargs="+", choices=("reversible", "checkpoint"), default=["reversible", "checkpoint"]
    )
    args = parser.parse_args(argv)
    first = min(args.steps)
    peaks: dict[tuple[str, str, int], int] = {}
    args.steps.sort()
    print(f"torch {torch.__version__}, the embedded pipeline in float64, a LoRA of rank {args.rank}")
    for solver in args.solvers:
        plain = measure(solver, first, "naive", args.rank)
        print(f"{solver}, naive, {first} steps: {format_bytes(plain[0])}")
        for memory in (memory for memory in args.memory if memory == "checkpoint" or solver == "EDICT"):
            for steps in args.steps:
                peak, found = measure(solver, steps, memory, args.rank)
                peaks[solver, memory, steps] = peak
                about = ""
                if steps == first:
                    error = relative(found, plain[1])
                    about = f", gradient off naive's by {error:.1e}"
                    assert error < 1e-9, about
                share = peak / peaks[solver, memory, first]
                print(
                    f"{solver}, {memory}, {steps} steps: {format_bytes(peak)}, {share:.3f} of {first} steps{about}",
                    flush=True,
                )
    return peaks


if __name__ == "__main__":
    main()
