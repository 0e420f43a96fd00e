"""What a gradient takes: a plan by a budget, and what was taken in fact.

    python examples/memory_plan.py

Three budgets, from the least that is possible to one that has room for every graph. The gradient is the same.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import doodl_fast
from doodl_fast import shapes


@dataclass
class Row:
    """One gradient.

    Attributes:
        budget: The bytes that it may take.
        predicted: The peak of its plan, in bytes.
        peak: The peak that was measured, in bytes.
        calls: How often the network was called, forwards and backwards.
        gradient: Of the noise.
    """

    budget: int
    predicted: int
    peak: int
    calls: int
    gradient: torch.Tensor


def measure(pipe: object, budget: int, steps: int, out: Path) -> Row:
    """Takes one gradient under a budget and returns what it took."""
    memory = doodl_fast.Auto(budget=budget)
    chain = doodl_fast.DDIM.from_pipeline(pipe, "a red star left of a blue circle", None, steps, memory=memory)
    noise = chain.noise(seed=0)
    plan = chain.make_plan(noise)
    noise.requires_grad_()
    with doodl_fast.profile(chain) as report:
        (latents,) = chain(noise)
        latents.square().mean().backward()
    report.save(out / f"{budget >> 20}MiB")
    assert noise.grad is not None
    print(f"\nbudget {budget / 2**20:.1f} MiB\n{plan}\nmeasured: {report.peak / 2**20:.1f} MiB")
    return Row(budget, plan.peak, report.peak, len(report.evaluations), noise.grad)


def main(argv: list[str] | None = None) -> list[Row]:
    """Runs the example and returns one row for each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("examples/out/memory_plan"))
    args = parser.parse_args(argv)

    pipe = shapes.load_pipeline()
    looking = doodl_fast.DDIM.from_pipeline(pipe, "a red star left of a blue circle", None, args.steps)
    least = looking.smallest_plan(looking.noise(seed=0)).peak
    rows = [measure(pipe, budget, args.steps, args.out) for budget in (least, 6 * least, 100 * least)]
    for row in rows[1:]:
        error = (row.gradient - rows[0].gradient).norm() / rows[0].gradient.norm()
        print(f"{row.calls} calls in place of {rows[0].calls}; the gradients differ by {float(error):.1e}")
    return rows


if __name__ == "__main__":
    main()
