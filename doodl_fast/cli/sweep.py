"""`doodl-fast sweep`: runs of many prompts, seeds, guides, methods and settings, by any number of processes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from ..sweep.plan import Plan, Run
    from ..sweep.worker import Summary

SOME_FAILED = 3
"""The exit code of a sweep of which runs failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "config",
        nargs="?",
        type=options.folder,
        metavar="CONFIG",
        help="a .toml, .json or .yaml file with prompts, seeds, guides, methods, settings, options, measures",
    )
    parser.add_argument("--out", type=options.folder, required=True, help="folder of the sweep; it may be shared")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value of the configuration, as in options.steps=12 or 'seeds=[0, 1]'; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the estimated memory, and end")
    parser.add_argument("--change-plan", action="store_true", help="replace the plan in --out; finished runs stay")
    parser.add_argument("--retry-failed", action="store_true", help="do runs again that failed")
    parser.add_argument("--no-wait", action="store_true", help="end while other processes still do runs")
    parser.add_argument(
        "--stale-after",
        type=options.number,
        default=120.0,
        metavar="SECONDS",
        help="when a process of another machine that gives no sign of life counts as dead",
    )
    options.add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Does the runs of a sweep that nobody has done; gives the exit code."""
    from ..sweep.config import assign, expand, read_config

    config = assign({} if args.config is None else read_config(args.config), args.set)
    plan = expand(config, Path() if args.config is None else args.config.parent)
    if not args.stale_after > 0:
        raise ValueError(f"--stale-after: expected a positive number of seconds, got {args.stale_after}")
    device = find_device(args.device)
    from .sweep_options import check
    from .sweep_runs import find_measure

    check(plan.runs, device)
    for measure in plan.measures:
        find_measure(measure)
    if args.dry_run:
        from .sweep_estimate import describe

        print(describe(plan, args.out, device))
        return 0
    plan.store(args.out, args.change_plan)
    found = _work(args, plan, device)
    _say(args.out, plan, found)
    return SOME_FAILED if found.failed else 0


def _work(args: argparse.Namespace, plan: Plan, device: str | None) -> Summary:
    """Does the runs, with a progress bar, and writes the tables and pages of the sweep."""
    from ..sweep.report import write_report
    from ..sweep.worker import forget_errors, is_done, work
    from .sweep_runs import Performer

    if args.retry_failed:
        forget_errors(args.out, plan.runs)
    done = sum(is_done(args.out, run) for run in plan.runs)
    with Bar(len(plan.runs), done) as bar:
        found = work(
            args.out,
            _rotated(plan.runs),
            Performer(plan.measures, device),
            progress=bar.update,
            wait=not args.no_wait,
            stale_after=args.stale_after,
        )
    write_report(args.out, plan, only_if_changed=not found.finished)
    return found


def find_device(name: str | None) -> str | None:
    """The device of this process: what --device says, or the GPU that `accelerate launch` and torchrun give it."""
    rank = os.environ.get("LOCAL_RANK", "")
    if name is not None or not rank.isdecimal():
        return name
    import torch

    return f"cuda:{int(rank) % torch.cuda.device_count()}" if torch.cuda.is_available() else None


def _rotated(runs: tuple[Run, ...]) -> list[Run]:
    """The runs, of which each process of a launch begins with others, so that they seldom look at the same ones."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    first = len(runs) * int(rank) // int(world) if rank.isdecimal() and world.isdecimal() and int(world) else 0
    return [*runs[first:], *runs[:first]]


class Bar:
    """A progress bar over all runs of a sweep, with the time left; the first process of a launch shows it.

    Args:
        total: The number of runs.
        done: How many are done already.
    """

    def __init__(self, total: int, done: int) -> None:
        from tqdm.auto import tqdm

        is_first = os.environ.get("RANK", "0") in ("", "0")
        self._bar: Any = tqdm(total=total, initial=done, unit="run", smoothing=0.05, disable=not is_first)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, done: int) -> None:
        """Shows how many runs are done, whoever did them."""
        if done > self._bar.n:
            self._bar.update(done - self._bar.n)


def _say(out: Path, plan: Plan, found: Summary) -> None:
    """Prints what has been done."""
    from ..sweep.report import GALLERY, TABLE
    from ..sweep.worker import ERROR, read_json

    left = f", {found.left} are still done by other processes" if found.left else ""
    print(f"{found.finished} of {len(plan.runs)} runs were done here{left}; {TABLE} and {GALLERY} are in {out}")
    for name in found.failed[:10]:
        error = read_json(out / "runs" / name / ERROR) or {}
        print(f"failed: {name}: {error.get('type')}: {error.get('error')}")
    if found.failed:
        print(f"{len(found.failed)} runs failed; --retry-failed does them again")
