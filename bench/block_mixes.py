"""What could be gained if every block of a network had a way of its own to keep its graph.

    python bench/block_mixes.py [--networks sd15 sdxl flux sd35]  # real sizes on the meta device, without memory

A plan of `memory="auto"` keeps the graph of an evaluation whole, without matrix products, or as the inputs of its
blocks, or does not keep it and evaluates again ("one way for all blocks"). A knapsack could choose for each block:
most operations saved per byte first ("a way for each block"). A row of the table is a budget for each evaluation, as a
share of its whole graph, which many evaluations may divide among them as they like. Its columns:

- "again": the FLOPs that are computed again, as a share of those of one evaluation, in three cases: all blocks are
  checkpointed, residual layers too ("alike"); residual layers are not, as in plans ("now"); a way for each block.
- "gradient": the FLOPs of a forward run, its vector-Jacobian product and what is computed again, in the second and the
  third case, as a share of those in the first.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from lean import MIB, REAL, Network, one_way, sizes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.cli.meta_attention import fused_attention
from doodl_fast.cli.meta_ops import fused_ops
from doodl_fast.diffusion.block_checkpoint import checkpoint
from doodl_fast.diffusion.module_copies import is_residual_layer

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Point = tuple[float, float]
"""Bytes that are kept of an evaluation, and FLOPs that are computed again for that."""


@dataclass
class Block:
    """One block of a network, in numbers.

    Attributes:
        residual: Whether it is a residual layer.
        kept: What its graph keeps beyond its inputs, in bytes.
        vjp: The FLOPs of its VJP.
        again: What is computed again of it if its inputs alone are kept. A checkpoint stops after the last
            operator whose result the VJP needs, so that is less than the block.
    """

    residual: bool
    kept: int
    vjp: int
    again: int


def measure_blocks(network: Network, way: str) -> list[Block]:
    """Measures each block of a network that can be checkpointed, in the order of their calls."""
    net, given, call = network
    found: list[Block] = []

    def called(block: Any, args: tuple[Any, ...]) -> tuple[int, int]:
        """What a block keeps beyond its inputs and results, in bytes, and the FLOPs of its VJP."""
        fresh = tree_map(lambda a: a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a, args)
        with torch.enable_grad():
            held = tracker.held
            outputs = [out for out in tree_leaves(block(*fresh)) if isinstance(out, Tensor) and out.requires_grad]
            held = tracker.held - held - sum(out.numel() * out.element_size() for out in outputs)
            flops = tracker.flops
            leaves = [leaf for leaf in tree_leaves(fresh) if isinstance(leaf, Tensor) and leaf.requires_grad]
            torch.autograd.grad(outputs, leaves, list(map(torch.empty_like, outputs)), allow_unused=True)
        return held, tracker.flops - flops

    def measured(block: Any, *args: Any) -> Any:
        again = functools.partial(checkpoint, block)
        kept, vjp = called(block, args)
        residual = isinstance(block, nn.Module) and is_residual_layer(block)
        found.append(Block(residual, kept, vjp, called(again, args)[1] - vjp))
        return again(*args)

    with one_way(net, way) as run, Tracker(given.device.type) as tracker:
        for module in run.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training, module.gradient_checkpointing = True, True
                module._gradient_checkpointing_func = measured
        call(run, given.clone().requires_grad_())
    return found


def hull(points: list[Point]) -> list[Point]:
    """The lower convex hull of points, without those that keep more and save nothing.

    Many evaluations share a budget, so whatever lies between two ways can be had.
    """
    found: list[Point] = []
    for point in sorted(points):
        if found and point[1] >= found[-1][1]:
            continue
        while len(found) > 1 and slope(found[-2], found[-1]) >= slope(found[-2], point):
            found.pop()
        found.append(point)
    return found


def slope(a: Point, b: Point) -> float:
    """FLOPs per byte between two points; it is negative."""
    return (b[1] - a[1]) / max(1, b[0] - a[0])


def again(points: list[Point], budget: float) -> float:
    """What is computed again within a budget for each evaluation."""
    found = hull(points)
    for a, b in itertools.pairwise(found):
        if a[0] <= budget <= b[0]:
            return a[1] + slope(a, b) * (budget - a[0])
    return found[-1][1]


def mixtures(start: Point, whole: list[Block], recompute: list[Block]) -> list[Point]:
    """What can be kept from blocks' inputs to whole graphs, if blocks go over to larger graphs one by one."""
    moves: list[tuple[float, float, float]] = []
    for large, small in zip(whole, recompute, strict=True):
        ways = hull([(0, large.again), (small.kept, max(0, small.vjp - large.vjp)), (large.kept, 0)])
        moves += [(slope(a, b), b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ways)]
    points = [start]
    for _, more, flops in sorted(moves):
        points.append((points[-1][0] + more, points[-1][1] + flops))
    return points


def report(title: str, network: Network) -> None:
    """Measures and prints one network."""
    rows = {way: sizes(network, way, operators=False) for way in ("lean", "recompute", "blocks")}
    whole, recompute = (measure_blocks(network, way) for way in ("lean", "recompute"))
    lean, small = rows["lean"], rows["recompute"]
    residual = [block for block in whole if block.residual]
    inputs = rows["blocks"]["kept"] - sum(block.kept for block in residual)
    checkpointed = (inputs, sum(block.again for block in whole))
    spared = (rows["blocks"]["kept"], checkpointed[1] - sum(block.again for block in residual))
    uniform = [(0, lean["forward"]), (small["kept"], small["flops"] - lean["flops"]), (lean["kept"], 0)]
    alike, now = [*uniform, checkpointed], [*uniform, spared]
    mixed = [*now, *mixtures(checkpointed, whole, recompute)]
    print(f"\n{title}")
    for name, (kept, flops) in (("inputs of blocks", checkpointed), ("and residual layers", spared)):
        print(f"  {name:<20} {kept / MIB:>8.0f} MiB, {flops / lean['forward']:.2f} of an evaluation again")
    print("  budget   again: alike, now, a way for each block   gradient: now, a way for each block")
    for share in BUDGETS:
        flops = [again(points, share * lean["kept"]) for points in (alike, now, mixed)]
        numbers = " ".join(f"{value / lean['forward']:>8.3f}" for value in flops)
        ratios = " ".join(f"{(lean['flops'] + value) / (lean['flops'] + flops[0]):>8.3f}" for value in flops[1:])
        print(f"  {share:>6.2f} {numbers}   {ratios}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("sd15", "sdxl", "flux", "sd35")
    parser.add_argument("--networks", nargs="+", choices=names, default=names, help="which networks")
    args = parser.parse_args(argv)
    for name in args.networks:
        title, make = REAL[name]
        with torch.device("meta"), fused_attention(), fused_ops():
            network = make()
            network[0].requires_grad_(False)
            report(title, network)


if __name__ == "__main__":
    main()
