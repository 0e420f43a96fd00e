"""What a sweep consists of, and what its runs take in memory, said before anything is loaded."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from .. import shapes
from ..sweep.plan import Plan
from ..sweep.worker import is_done
from . import options
from .sweep_options import different, namespace


def describe(plan: Plan, out: Path, device: str | None) -> str:
    """The plan of a sweep and its estimated memory, in words.

    Args:
        plan: The runs.
        out: The folder of the sweep.
        device: What --device is.
    """
    runs = plan.runs
    done = sum(is_done(out, run) for run in runs)
    lines = [f"{len(runs)} runs, of which {done} are done, in {out}"]
    for name in ("prompt", "seed", "guide", "setting", "method"):
        counts = Counter(getattr(run, name) for run in runs)
        names = [str(value) for value in counts if value != ""]
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        if names:
            lines.append(f"  {len(names)} {name}{'s' if len(names) > 1 else ''}: {shown}")
    if plan.measures:
        lines.append(f"  measured by {', '.join(plan.measures)}")
    lines += ["", "estimated memory of a gradient through EDICT, without guide and CUDA context:"]
    cases: dict[str, tuple[Path, argparse.Namespace]] = {}
    for run in different(runs):
        args = namespace(run, device)
        size = "" if args.height is None and args.width is None else f", {args.height} x {args.width} pixels"
        model = shapes.WEIGHTS / "pipeline" if args.model == options.EMBEDDED else Path(args.model).expanduser()
        cases.setdefault(f"{args.model}, {args.dtype}, {args.steps} steps{size}", (model, args))
    return "\n".join([*lines, *(f"  {case}: {_memory(model, args)}" for case, (model, args) in cases.items())])


def _memory(model: Path, args: argparse.Namespace) -> str:
    """The estimate for the options of a run."""
    from ..chain.memory.plan import format_bytes
    from .estimate import estimate
    from .families import own_options

    if not model.is_dir():
        return "unknown, as the model is not in a local folder; see `doodl-fast estimate --help`"
    given = {name: getattr(args, name) for name in ("height", "width", "guidance_scale")}
    call = {**{name: value for name, value in given.items() if value is not None}, **own_options(args)}
    try:
        found = estimate(model, None, options.find_dtype(args.dtype), args.steps, **call)
    except (ValueError, TypeError) as error:
        return f"unknown for this model ({error})"
    return (
        f"{format_bytes(found.weights)} of weights, {format_bytes(found.weights + found.smallest.peak)} at least, "
        f"{format_bytes(found.weights + found.per_step)} with checkpointed steps, "
        f"{format_bytes(found.weights + found.naive)} with whole graphs"
    )
