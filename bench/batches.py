"""What one call for several pictures saves against a call for each: gradients of chains, and decodes of EDICT's pair.

    python bench/batches.py [--device D] [--batches 2,4,8] [--steps 4] [--rounds 5]

Pictures that share the timesteps go through a chain as one batch, also with a prompt each: the network is called once
for all of them. `optimize` decodes the two final latents of EDICT one after the other, so that the graph of one decode
is kept at a time. The script compares both with their alternative: B chains of one picture each, and one decode of
both latents. The network is the embedded pipeline's. Ratios are medians over rounds in which the two take turns, of the
process's CPU seconds on a CPU and of seconds on a GPU; above 1 means that the batch is faster. The decodes are those of
pictures with `--side` pixels by the embedded VAE, and the memory is what the graphs of one decode and of two keep.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from doodl_fast import EDICT, shapes
from doodl_fast.frozen.kept import kept_by_operator

PROMPTS = ("a red circle", "a blue star", "a green square", "a yellow triangle")


def clock(device: str) -> float:
    """CPU seconds of the process on a CPU, seconds on a GPU."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ratio(apart: Callable[[], object], together: Callable[[], object], device: str, rounds: int) -> float:
    """The median of how many times as fast `together` is as `apart`, after one round to warm up."""
    found = []
    for _ in range(rounds + 1):
        began = clock(device)
        apart()
        middle = clock(device)
        together()
        found.append((middle - began) / (clock(device) - middle))
    return statistics.median(found[1:])


def gradient(chain: EDICT, x: Tensor) -> Tensor:
    """The gradient of the sum of squares of both final latents."""
    leaf = x.clone().requires_grad_()
    outputs = chain(leaf)
    return torch.autograd.grad(sum(output.square().sum() for output in outputs), leaf)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", default="2,4,8")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pipe = shapes.load_pipeline(args.device)
    options = {"num_inference_steps": args.steps, "guidance_scale": 4.0, "memory": "checkpoint"}
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.steps} steps\n")
    print("| pictures | one chain for all is so many times as fast as a chain for each | gradients differ by |")
    print("|---|---|---|")
    for batch in map(int, args.batches.split(",")):
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
        whole = EDICT.from_pipeline(pipe, prompts, **options)
        single = [EDICT.from_pipeline(pipe, prompt, **options) for prompt in prompts]
        noise = whole.noise(seed=0, batch=batch)

        def apart(single: list[EDICT] = single, noise: Tensor = noise) -> Tensor:
            return torch.cat([gradient(chain, noise[i : i + 1]) for i, chain in enumerate(single)])

        def together(whole: EDICT = whole, noise: Tensor = noise) -> Tensor:
            return gradient(whole, noise)

        off = float((apart() - together()).norm() / together().norm())
        print(f"| {batch} | {ratio(apart, together, args.device, args.rounds):.2f} | {off:.1e} |", flush=True)
    decode, side = whole.decode, args.side // 4
    pair = torch.randn(2, 1, whole.noise(seed=0).shape[1], side, side).to(args.device)

    def decoded(latents: Tensor) -> Tensor:
        leaf = latents.clone().requires_grad_()
        return torch.autograd.grad(decode(leaf).square().sum(), leaf)[0]

    one = ratio(lambda: [decoded(x) for x in pair], lambda: decoded(pair.flatten(0, 1)), args.device, args.rounds)
    kept = [sum(kept_by_operator(decode(x.requires_grad_())).values()) / 2**20 for x in (pair[0], pair.flatten(0, 1))]
    print(f"\nOne decode of both latents is {one:.2f} times as fast as two.")
    print(f"Its graph keeps {kept[1]:.1f} MiB, and that of one decode {kept[0]:.1f}.")


if __name__ == "__main__":
    main()
