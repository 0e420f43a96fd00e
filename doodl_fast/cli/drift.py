"""`doodl-fast drift`: how far a chain that is run and undone ends from its start, by arithmetic and number of steps."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, options
from .checks import check_sizes
from .families import (
    PROMPT,
    add_guidance_scale,
    add_own_options,
    add_prompt,
    check_prompt,
    fill_guidance_scale,
    timestep_options,
)
from .files import write_json
from .solvers import check_share, make_edict

if TYPE_CHECKING:
    from torch import Tensor

    from ..diffusion.denoiser import Denoiser
    from ..diffusion.schedule import Schedule

STEPS = (10, 20, 50, 100, 250, 1000)
FLOATS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
EXACT = "exact"
TABLE, FIGURE = "drift.json", "drift.png"

Table = dict[str, list[float]]


def measure(
    denoiser: Denoiser,
    scheduler: Any,
    x: Tensor,
    steps: Sequence[int],
    mix_weight: float = 0.93,
    report: Any = None,
    timesteps: Callable[[int], dict[str, Any]] = lambda steps: {},
) -> Table:
    """Measures the relative error of noise -> image -> noise.

    In the rows "fp16" to "fp64" the latents are rounded to that dtype after every coupling, as plain EDICT (arXiv
    2211.12446) does on latents of that dtype. The network and its dtype are the same in all rows, and so is the start,
    which is rounded to bf16 because every row can hold such numbers.

    Args:
        denoiser: The network with its prompt.
        scheduler: The diffusers scheduler.
        x: The start of both latents, (B, C, h, w).
        steps: The numbers of diffusion steps.
        mix_weight: EDICT's p.
        report: If given, it is called with every (arithmetic, steps, error).
        timesteps: Gives, for a number of steps, further arguments of `Schedule.from_scheduler` (a flow's mu).

    Returns:
        For each arithmetic the errors in the order of `steps`; NaN stands for an overflow.
    """
    from ..diffusion.schedule import Schedule

    table: Table = {}
    x = x.to(dtype=_dtype("bf16")).float()
    for name in (*FLOATS, EXACT):
        table[name] = []
        for count in steps:
            schedule = Schedule.from_scheduler(scheduler, count, **timesteps(count))
            table[name].append(_error(name, denoiser, schedule, mix_weight, x))
            if report is not None:
                report(name, count, table[name][-1])
    return table


def _error(name: str, denoiser: Denoiser, schedule: Schedule, mix_weight: float, x: Tensor) -> float:
    """The error in one arithmetic of one schedule."""
    import torch

    from ..chain.arithmetic import Floats, Group
    from ..chain.reversibility import there_and_back
    from ..solvers.edict import EDICT

    with torch.no_grad(), denoiser.running():
        if name == EXACT:
            chain = EDICT(denoiser, schedule, mix_weight, arithmetic=EXACT)
            run = chain.runs.new_run(x)
            try:
                return there_and_back(run, run.new_arithmetic(), x, x, graph=False)[0]
            except (OverflowError, FloatingPointError):
                return math.nan
        chain, x = EDICT(denoiser, schedule, mix_weight), x.to(_dtype(name))
        singly = tuple(Group(coupling, None, end) for end, coupling in enumerate(chain.program, start=1))
        run = replace(chain.runs.new_run(x), groups=singly)
        return there_and_back(run, Floats(x.dtype, x.dtype), x, x, graph=False)[0]


def _dtype(name: str) -> Any:
    """The torch dtype of a row."""
    import torch

    return getattr(torch, FLOATS[name])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    options.add_model(parser, options.EMBEDDED)
    add_prompt(parser, f"(default: {PROMPT!r}, where the model takes a prompt)")
    parser.add_argument(
        "--steps", type=options.integer(), nargs="+", default=list(STEPS), help="diffusion steps, one or more"
    )
    add_guidance_scale(parser)
    options.add_size(parser)
    add_own_options(parser)
    options.add_mix_weight(parser)
    parser.add_argument("--seed", type=options.integer(options.SEEDS), default=0)
    options.add_device(parser)
    options.add_dtype(parser)
    parser.add_argument("--out", type=options.folder, default=Path("drift"), help=f"folder for {FIGURE} and {TABLE}")


def run(args: argparse.Namespace) -> int:
    """Prints the table of a model, and writes the figure and the numbers."""
    options.check_folder(args.out)
    if min(args.steps) < 1:
        raise ValueError(f"--steps: expected numbers of at least 1, got {min(args.steps)}")
    options.check_model(args.model)
    check_prompt(args, PROMPT)
    fill_guidance_scale(args)
    check_share("mix_weight", args.mix_weight)
    check_sizes(args, args.steps, ("height", "width"), "--steps")
    pipeline = options.load_pipeline(args)
    scheduler = options.without_offset(pipeline.scheduler)
    steps = sorted(set(args.steps))
    chain = make_edict(args, pipeline, steps[0])
    print(f"{'steps':<6}" + "".join(f"{count:>10}" for count in steps), flush=True)

    def report(name: str, count: int, error: float) -> None:
        start = f"{name:<6}" if count == steps[0] else ""
        print(start + f"{_cell(error):>10}", end="\n" if count == steps[-1] else "", flush=True)

    timesteps = timestep_options(args, pipeline)
    table = measure(chain.denoiser, scheduler, chain.noise(args.seed), steps, args.mix_weight, report, timesteps)
    args.out.mkdir(parents=True, exist_ok=True)
    stored = options.as_json(args)
    errors = {name: [None if math.isnan(error) else error for error in row] for name, row in table.items()}
    write_json(args.out / TABLE, {"steps": steps, "errors": errors, "options": stored})
    draw(args.out / FIGURE, steps, table)
    print(f"relative error of noise -> image -> noise; {FIGURE} and {TABLE} in {args.out}")
    return 0


def _cell(error: float) -> str:
    """An error as it is printed in the table."""
    return "overflow" if not math.isfinite(error) else "0" if error == 0 else f"{error:.1e}"


def draw(path: Path, steps: Sequence[int], table: Table) -> None:
    """Draws the errors against the number of steps, on logarithmic axes.

    An error of zero is drawn on the lower edge of the figure, an overflow on the upper edge.
    """
    from matplotlib.figure import Figure

    floor, ceiling = 1e-18, 1e6
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, row in table.items():
        drawn = [min(max(error, floor), ceiling) if math.isfinite(error) else ceiling for error in row]
        label = f"{name} (0)" if not any(row) else name
        axes.plot(steps, drawn, marker="o", markersize=4, label=label, clip_on=False)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(xscale="log", yscale="log", ylim=(floor, ceiling), xlabel="diffusion steps")
    axes.set_xticks(list(steps), [str(count) for count in steps])
    axes.minorticks_off()
    axes.set_ylabel("relative error of noise \N{RIGHTWARDS ARROW} image \N{RIGHTWARDS ARROW} noise")
    axes.grid(alpha=0.3)
    axes.legend(title="arithmetic")
    files.replace(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
