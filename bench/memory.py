"""Time of a gradient with memory="auto" and room for every graph, and with its smallest plan.

    python bench/memory.py [--steps 8] [--rounds 5] [--batch 1] [--compile]

Both are compared with memory="checkpoint" on the embedded pipeline, in one process. Each round takes one gradient of
each, in an order that changes from round to round. The script prints the median and the range of the rounds' ratios to
checkpoint's time, in wall-clock time and in CPU time, which a busy machine disturbs less. It checks that with every
graph the gradient is the same bit for bit, and with the smallest plan the same to 1e-6 of its norm. With --compile it
also measures memory="checkpoint" with a compiled network, and prints how far that gradient is off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from doodl_fast import EDICT, shapes
from doodl_fast.chain.memory.plan import format_bytes


def make_chains(steps: int, batch: int, compiled: bool) -> tuple[dict[str, EDICT], Tensor]:
    """Makes the chains that are measured, each of which has taken one gradient, and their start."""
    pipe = shapes.load_pipeline()

    def make(**options: Any) -> EDICT:
        return EDICT.from_pipeline(pipe, "a red circle", num_inference_steps=steps, guidance_scale=4.0, **options)

    chains = {"checkpoint": make(memory="checkpoint"), "auto": make(memory="auto")}
    x = chains["auto"].noise(batch=batch)
    smallest = chains["auto"].smallest_plan(x)
    chains["auto, smallest"] = make(memory="auto", memory_budget=smallest.peak)
    if compiled:
        chains["compiled"] = make(memory="checkpoint", compile=True)
    for chain in chains.values():
        gradient(chain, x)
    return chains, x


def gradient(chain: EDICT, x: Tensor) -> Tensor:
    """The gradient of the sum of squares of both final latents."""
    leaf = x.clone().requires_grad_()
    outputs = chain(leaf)
    return torch.autograd.grad(outputs[0].square().sum() + outputs[1].square().sum(), leaf)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a gradient by memory plan.")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    chains, x = make_chains(args.steps, args.batch, args.compile)
    clocks = {"clock": time.perf_counter, "CPU": time.process_time}
    ratios: dict[tuple[str, str], list[float]] = {(name, clock): [] for name in chains for clock in clocks}
    for turn in range(args.rounds):
        names = list(chains)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        seconds, found = {}, {}
        for name in names:
            began = {clock: read() for clock, read in clocks.items()}
            found[name] = gradient(chains[name], x)
            seconds[name] = {clock: read() - began[clock] for clock, read in clocks.items()}
        expected = found["checkpoint"]
        assert torch.equal(found["auto"], expected)
        assert (found["auto, smallest"] - expected).norm() < 1e-6 * expected.norm()
        for name, clock in ratios:
            ratios[name, clock].append(seconds[name][clock] / seconds["checkpoint"][clock])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.steps} steps, batch {args.batch}")
    for name, chain in chains.items():
        plan = "" if chain.plan is None else f", predicted peak {format_bytes(chain.plan.peak)}: {chain.plan.kept}"
        for clock in clocks:
            all_rounds = ratios[name, clock]
            share = f"{statistics.median(all_rounds):.2f} ({min(all_rounds):.2f} to {max(all_rounds):.2f})"
            print(f"{name:<16} {share} of checkpoint's {clock} time{plan}")
    if args.compile:
        print(f"compiled: gradient off by {(found['compiled'] - expected).norm() / expected.norm():.1e}")


if __name__ == "__main__":
    main()
