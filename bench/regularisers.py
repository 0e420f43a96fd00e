"""Which share of an optimisation step a regulariser of the noise takes, which is all that a fused one could save.

    python bench/regularisers.py
    python bench/regularisers.py --steps 1 --rounds 50

A step is the gradient of CLIP's score with respect to the starting latents, through the decoder and the chain (DDIM) of
the embedded pipeline. A regulariser is its value and its gradient by autograd. Both are timed in turns in one process,
in seconds of its CPU time, and the table has the ratio of their medians. Those of `NoiseNorm` and `StartDistance` are
elementwise, but for a sum, so that they could be fused with the update of the latents.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import doodl_fast
from doodl_fast import shapes
from doodl_fast.guidance import ClipText, NoiseNorm, NoiseProbability, StartDistance, Whiteness


def seconds(call: Callable[[], Any]) -> float:
    """The CPU time of a call."""
    before = time.process_time()
    call()
    return time.process_time() - before


def regularisers(noise: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What computes the value and the gradient of each regulariser."""

    def gradient(regulariser: Any) -> Callable[[], Any]:
        def call() -> Any:
            leaf = noise.detach().requires_grad_()
            return torch.autograd.grad(regulariser(None, start=leaf), leaf)

        return call

    found = (NoiseNorm(), StartDistance(noise), Whiteness(), NoiseProbability())
    return {type(one).__name__: gradient(one) for one in found}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints a table. Returns each regulariser's share of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--latents", type=int, nargs="+", metavar="N", help="their shape (default: the pipeline's)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pipe, (clip, processor) = shapes.load_pipeline(), shapes.load_clip()
    chain = doodl_fast.DDIM.from_pipeline(pipe, "a red circle", num_inference_steps=args.steps, memory="checkpoint")
    noise, guide = chain.noise(seed=0), ClipText(clip, processor, "a red circle")
    other = noise if args.latents is None else torch.randn(args.latents)

    def step() -> Any:
        leaf = noise.detach().requires_grad_()
        return torch.autograd.grad(guide(chain.decode(chain(leaf)[0])), leaf)

    calls = {"step": step, **regularisers(other)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(args.rounds + 1):
        for name, call in calls.items():
            taken = seconds(call)
            if number:  # The first round warms up.
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"torch {torch.__version__}, {args.steps} sampling steps, latents {tuple(other.shape)}, one thread")
    shares = {name: medians[name] / medians["step"] for name in calls if name != "step"}
    for name, share in shares.items():
        print(f"{name}: {share:.2%} of a step")
    return shares


if __name__ == "__main__":
    main()
