"""Time of a gradient with memory="auto" at budgets that do not hold every graph: lean graphs against PyTorch's own.

    python bench/budgets.py [--network embedded|small] [--steps 6] [--rounds 5] [--shares 0.5 0.25]

A budget is a share of the peak of a gradient that keeps every graph of plain PyTorch. At each the same chain is run in
three ways, which take turns in one process:

    whole   lean=False, and whole graphs of PyTorch's own layers of as many of the last evaluations as fit
    plain   lean=False, and whatever memory="auto" keeps: whole graphs, or the inputs of the network's blocks
    lean    lean=True, and whatever memory="auto" keeps: lean graphs too, and such without matrix products

The script prints the ratio of the CPU seconds of the first to those of the others in each round (above 1: faster than
whole graphs), and what was planned. It checks that the gradients are the same bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from doodl_fast import EDICT, Denoiser, Schedule, shapes
from doodl_fast.chain.memory.plan import format_bytes
from doodl_fast.chain.ways import WHOLE

SMALL = {
    "block_out_channels": (64, 128, 256, 256),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "sample_size": 32,
}
"""Stable Diffusion's UNet with a fifth of its channels."""


def make(network: str, steps: int, batch: int) -> tuple[Any, Tensor]:
    """A function that makes chains, and their start."""
    if network == "embedded":
        pipe = shapes.load_pipeline()

        def chain(**options: Any) -> EDICT:
            return EDICT.from_pipeline(pipe, "a red circle", num_inference_steps=steps, guidance_scale=4.0, **options)

        return chain, chain().noise(batch=batch)
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SMALL).eval().requires_grad_(False)
    cond, uncond = torch.randn(2, 1, 77, SMALL["cross_attention_dim"])
    schedule = Schedule.from_scheduler(DDIMScheduler(clip_sample=False), steps)

    def other(lean: bool, **options: Any) -> EDICT:
        return EDICT(Denoiser(unet, cond, uncond, 4.0, lean=lean), schedule, **options)

    return other, torch.randn(batch, 4, 32, 32)


def gradient(chain: EDICT, x: Tensor) -> Tensor:
    """The gradient of the sum of squares of both final latents."""
    leaf = x.clone().requires_grad_()
    outputs = chain(leaf)
    return torch.autograd.grad(outputs[0].square().sum() + outputs[1].square().sum(), leaf)[0]


def keep_whole_graphs(chain: EDICT, x: Tensor) -> EDICT:
    """Gives a chain the plan with as many whole graphs as fit into its budget, or none."""
    assert chain.planner is not None and chain.memory_budget is not None
    case = chain.planner.case(x)
    plans = [case.workload.plan(((WHOLE, count),)) for count in range(chain.num_network_calls + 1)]
    case.plan, case.reserve = max((p for p in plans if p.peak <= chain.memory_budget), key=lambda p: p.num_graphs), 0
    return chain


def compare(chains: dict[str, EDICT], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """The ratios of the CPU seconds of whole graphs to those of the others, one for each round."""
    names = list(chains)
    ratios: dict[str, list[float]] = {name: [] for name in names[1:]}
    for turn in range(rounds + 1):
        seconds, found = {}, {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.process_time()
            found[name] = gradient(chains[name], x)
            seconds[name] = time.process_time() - began
        assert all(torch.equal(found[name], found["whole"]) for name in names)
        for name in names[1:] if turn else ():  # The first round plans and warms up.
            ratios[name].append(seconds["whole"] / seconds[name])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("embedded", "small"), default="embedded")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5])
    args = parser.parse_args()
    chain, x = make(args.network, args.steps, args.batch)
    every = chain(lean=False, memory="auto").make_plan(x).peak
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.network}, {args.steps} steps")
    print(f"every graph of plain PyTorch: {format_bytes(every)}")
    for share in args.shares:
        budget = int(share * every)
        names = ("whole", "plain", "lean")
        chains = {name: chain(lean=name == "lean", memory="auto", memory_budget=budget) for name in names}
        keep_whole_graphs(chains["whole"], x)
        print(f"\nbudget {share:g} of that, {format_bytes(budget)}")
        for name, ratios in compare(chains, x, args.rounds).items():
            shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{name} is {shown} times as fast as whole")
        for name, made in chains.items():
            print(f"{name}:\n  " + str(made.plan).replace("\n", "\n  "))


if __name__ == "__main__":
    main()
