"""Counts the kernels that one EDICT step launches on a GPU, with plain expressions and with each backend of the ops.

    python bench/launches.py        (prints one line of JSON)

The network has fp16 weights, runs with guidance and costs one launch, or two with its gradient. The count of a step is
the difference between chains of 6 and of 5 steps. Copies and fills count as launches. "plain" is memory="naive", which
computes the couplings by torch expressions under plain autograd and does not evaluate the network again in its backward
pass. The others are memory="checkpoint".
"""

from __future__ import annotations

import json
import sys

import torch
from torch.profiler import ProfilerActivity, profile

import doodl_fast
from doodl_fast import ops

SHAPE = (1, 4, 64, 64)


class Scaled(torch.nn.Module):
    """A network of one launch with a weight, by whose dtype a chain scales the cotangents of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def launches(steps: int, memory: str) -> tuple[int, int]:
    """The number of launches in a chain's forward pass, and in its backward pass."""
    alphas = torch.linspace(0.1, 0.95, steps + 1).tolist()
    schedule = doodl_fast.Schedule(tuple(range(steps, 0, -1)), tuple(alphas[:-1]), tuple(alphas[1:]))
    conditions = torch.zeros(2, 1, 1, 1, device="cuda", dtype=torch.float16)
    denoiser = doodl_fast.Denoiser(Scaled().half().cuda(), conditions[0], conditions[1])
    chain = doodl_fast.EDICT(denoiser, schedule, memory=memory)
    x = torch.randn(SHAPE, device="cuda").requires_grad_()
    counts = (0, 0)
    for _ in range(2):  # The first round compiles the Triton kernels.
        with profile(activities=[ProfilerActivity.CUDA]) as forward:
            outputs = chain(x, x)
            torch.cuda.synchronize()
        loss = outputs[0].sum() + outputs[1].sum()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as backward:
            loss.backward()
            torch.cuda.synchronize()
        counts = (on_device(forward), on_device(backward))
    return counts


def on_device(seen: profile) -> int:
    """The number of events on the GPU."""
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


def per_step(memory: str) -> dict[str, int]:
    """The number of launches that one more step adds to each pass."""
    short, long = launches(5, memory), launches(6, memory)
    return {"forward": long[0] - short[0], "backward": long[1] - short[1]}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench/launches.py counts launches on a GPU, and torch sees none")
    found = {"plain": per_step("naive")}
    for name in ops.NAMES:
        if ops.why_not(name, "cuda") is None:
            with ops.backend(name):
                found[name] = per_step("checkpoint")
    print(json.dumps({"launches per EDICT step": found}))


if __name__ == "__main__":
    main()
