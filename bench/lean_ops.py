"""Whole small networks with lean layers, with and without the ops that these call: seconds of a call and its gradient.

    python bench/lean_ops.py [--networks flux sd35 ...] [--rounds 9] [--threads 1] [--out FILE]

The networks are the small ones of bench/lean.py, on the CPU in float32. A row is an op that a network's lean layers
call, or all of them together: how often one call and its vector-Jacobian product (VJP) call it and its gradient, and
the processor time with all ops as a share of that with PyTorch's operators in the place of this one. The ways run in
turn within a round, in the opposite order in every second round, and a share is the median of the rounds' shares. "Same
bits" says whether the output and the gradient are equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lean import SMALL, Network, one_way
from torch import Tensor

from doodl_fast import ops
from doodl_fast.frozen import gated, group_norm, modulated_norm, quick_gelu, rotary

CALLERS = {
    "group_norm_silu": group_norm,
    "modulated_norm": modulated_norm,
    "gated_activation": gated,
    "quick_gelu": quick_gelu,
    "rotary_embedding": rotary,
}
"""The ops that lean layers call, and the modules that decide whether they do."""


def never(*args: Any, **kwargs: Any) -> bool:
    """Says of no tensor that an op pays."""
    return False


@contextmanager
def left_out(names: tuple[str, ...]) -> Iterator[None]:
    """Lean layers use PyTorch's operators in the place of some ops."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(CALLERS[name], "_pays", never))
        yield


def gradient(network: Network, run: Any) -> tuple[Tensor, Tensor, float, float]:
    """The output of a call, the gradient of its input for a cotangent of ones, and the CPU seconds of both."""
    x = network[1].clone().requires_grad_()
    began = time.process_time()
    output = network[2](run, x)
    between = time.process_time()
    (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
    return output.detach(), grad, between - began, time.process_time() - between


def calls(network: Network, run: Any) -> Counter[str]:
    """How often a call and its VJP call each op and its gradient."""
    found: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for op in CALLERS:
            for name in (op, f"{op}_backward"):
                stack.enter_context(mock.patch.object(ops, name, counting(name, getattr(ops, name))))
        gradient(network, run)
    return found


def compared(network: Network, rounds: int) -> list[dict[str, Any]]:
    """Times a lean network without each op that it calls, and without all, against the same with all."""
    with one_way(network[0], "lean") as run:
        counts = calls(network, run)
        used = tuple(op for op in CALLERS if counts[op])
        ways: dict[str, tuple[str, ...]] = {"": (), **{op: (op,) for op in used}}
        if len(used) > 1:
            ways["all"] = used
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        results = {}
        for number in range(rounds + 1):
            for way in list(ways)[:: 1 if number % 2 else -1]:
                with left_out(ways[way]):
                    *results[way], forward, backward = gradient(network, run)
                if number:  # The first round warms up.
                    seconds[way].append((forward, backward))
    return [
        {
            "op": way,
            "calls": sum(counts[op] for op in ways[way]),
            "backward calls": sum(counts[f"{op}_backward"] for op in ways[way]),
            **shares(seconds[""], seconds[way]),
            "same bits": all(map(torch.equal, results[""], results[way])),
        }
        for way in list(ways)[1:]
    ]


def shares(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> dict[str, float]:
    """The medians of the rounds' shares of time, for the call, its VJP and both together."""
    parts = {"forward": lambda pair: pair[0], "VJP": lambda pair: pair[1], "both": sum}
    return {
        name: statistics.median(part(a) / part(b) for a, b in zip(ours, theirs, strict=True))
        for name, part in parts.items()
    }


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=SMALL, default=["flux", "sd35", "sd15", "clip"])
    parser.add_argument("--rounds", type=int, default=9, help="how often each way is timed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"argument --rounds: expected at least 1, got {args.rounds}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| network | op | calls, of the gradient | time with the ops: call, VJP, both | same bits |")
    print("|---|---|---|---|---|")
    found = []
    for name in args.networks:
        title, make = SMALL[name]
        network = make()
        network[0].requires_grad_(False)
        rows = compared(network, args.rounds)
        for row in rows:
            times = ", ".join(f"{row[part]:.3f}" for part in ("forward", "VJP", "both"))
            equal = "yes" if row["same bits"] else "no"
            print(
                f"| {title} | {row['op']} | {row['calls']}, {row['backward calls']} | {times} | {equal} |", flush=True
            )
        if not rows:
            print(f"| {title} | none | | | |", flush=True)
        found.append({"network": name, "title": title, "ops": rows})
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
