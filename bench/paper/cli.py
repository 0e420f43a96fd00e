"""The command line of the comparison; see the package's docstring."""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from .runner import QUICK, Runner, Setting, quiet


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison. Returns 0 if the folder is complete."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing in a folder")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--quick", action="store_true", help="a small version of everything")
    run.add_argument("--device", default="cpu", help="cpu or cuda")
    run.add_argument("--chunk", type=int, help="the most samples of one batch; 160 on a GPU, 8 on a CPU")
    run.add_argument("--workers", type=int, help="processes that judge pictures; 8 on a GPU, none on a CPU")
    run.add_argument("--limit", type=float, help="begin nothing after so many seconds; the same command goes on later")
    for name in ("prompts", "seeds", "tune-prompts", "tune-seeds", "trials", "budget", "checkpoints", "drawn"):
        run.add_argument(f"--{name}", type=int)
    run.add_argument("--tasks", nargs="+")
    run.add_argument("--methods", nargs="+")
    page = commands.add_parser("report", help="write the page, its figures and the JSON file of a folder")
    page.add_argument("out", type=Path)
    page.add_argument("--to", type=Path, required=True, help="where they are written, docs/results for instance")
    args = parser.parse_args(argv)
    if args.command == "report":
        from . import report

        report.write(args.out, args.to)
        print(args.to / report.PAGE)
        return 0
    names = {field.name for field in fields(Setting)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    given |= {name: tuple(given[name]) for name in ("tasks", "methods") if name in given}
    setting = replace(QUICK if args.quick else Setting(), **given)
    on_gpu = torch.device(args.device).type == "cuda"
    began = time.monotonic()
    count = 1 if on_gpu else min(os.cpu_count() or 1, len(setting.tasks))
    if count == 1:
        complete = _run(args, setting, (0, 1))
    else:
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            complete = all(pool.map(_run, [args] * count, [setting] * count, [(i, count) for i in range(count)]))
    print(f"{'complete' if complete else 'not complete'} after {time.monotonic() - began:.0f} s: {args.out}")
    return 0 if complete else 1


def _run(args: argparse.Namespace, setting: Setting, share: tuple[int, int]) -> bool:
    """Runs a share of the tasks in this process. Returns whether it is complete."""
    on_gpu = torch.device(args.device).type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)  # The tensors are small, and each core has a process.
    workers = (8 if on_gpu else 0) if args.workers is None else args.workers
    deadline = None if args.limit is None else time.monotonic() + args.limit
    with quiet():
        chunk = args.chunk or (160 if on_gpu else 8)
        return Runner(args.out, setting, args.device, chunk, workers, _shown(args), deadline, share).run()


def _shown(args: argparse.Namespace) -> str:
    """The options that decide what is run, and where, as the command has them."""
    words = ["--quick"] if args.quick else []
    for name, value in vars(args).items():
        if value is not None and name not in ("command", "out", "quick", "limit", "workers"):
            words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)
