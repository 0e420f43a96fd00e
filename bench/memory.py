"""Time of a gradient with memory="auto" and room for every graph, beside memory="checkpoint"; and its smallest plan.

    python bench/memory.py [--steps 8] [--rounds 5] [--batch 1] [--compile]

On the embedded pipeline, in one process, round by round one gradient of each, in an order that turns. Prints the median
of the rounds' ratios to checkpoint's time, and their range, on the clock and in CPU time, which a busy machine disturbs
less; with every graph the gradient must be the same bits, with the smallest plan the same to 1e-6 of its norm.
--compile adds memory="checkpoint" with a compiled network, whose gradient's difference is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from doodl_fast import EDICT, Denoiser, Schedule, encode_prompt, shapes
from doodl_fast.chain.memory.plan import format_bytes
from doodl_fast.diffusion.pipeline import initial_latents


def contenders(steps: int, batch: int, compiled: bool) -> tuple[dict[str, EDICT], Tensor]:
    pipe = shapes.load_pipeline()
    x = initial_latents(pipe, batch=batch)
    conditions = encode_prompt(pipe, "a red circle")[:2]
    denoiser = Denoiser(pipe.unet, *conditions, 4.0)
    schedule = Schedule.from_scheduler(pipe.scheduler, steps)
    chains = {"checkpoint": EDICT(denoiser, schedule), "auto": EDICT(denoiser, schedule, memory="auto")}
    smallest = chains["auto"].smallest_plan(x)
    chains["auto, smallest"] = EDICT(denoiser, schedule, memory="auto", memory_budget=smallest.peak)
    if compiled:
        chains["compiled"] = EDICT(Denoiser(pipe.unet, *conditions, 4.0, compile=True), schedule)
    for chain in chains.values():
        gradient(chain, x)
    return chains, x


def gradient(chain: EDICT, x: Tensor) -> Tensor:
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
    chains, x = contenders(args.steps, args.batch, args.compile)
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
