"""`doodl-fast profile`: the memory and time of a gradient through a model, measured, or estimated without weights."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import estimating, files, options
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
from .solvers import check_share, make_edict

if TYPE_CHECKING:
    from ..chain.memory.profiling import MemoryReport
    from .baselines import Setting

TABLE, FIGURE, TIMELINES = "profile.json", "profile.png", "timelines.png"
STEPS, SIDES = (4, 8, 16), ("height", "width")


@dataclass(frozen=True)
class Row:
    """What one baseline took at one number of diffusion steps.

    Attributes:
        name: The baseline's name.
        steps: The number of diffusion steps.
        peak: The largest number of bytes that tensors held at any time.
        held: The bytes that tensors held between the forward and the backward pass.
        rss: The largest resident set of the whole process in bytes; None where the system does not tell it.
        seconds: The wall-clock time of the fastest gradient, without the memory tracker.
        cpu_seconds: The CPU time, of all threads, of the fastest gradient, without the memory tracker.
    """

    name: str
    steps: int
    peak: int
    held: int
    rss: int | None
    seconds: float
    cpu_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "--estimate",
        type=options.text,
        metavar="MODEL",
        help="the same as `doodl-fast estimate MODEL`; nothing is measured",
    )
    parser.add_argument(
        "--resolution",
        type=options.integer(options.LARGEST_SIDE),
        help="of the square image in pixels (default: the model's own)",
    )
    options.add_dtype(parser)
    options.add_model(parser, options.EMBEDDED)
    add_prompt(parser, f"(default: {PROMPT!r}, where the model takes a prompt)")
    add_guidance_scale(parser)
    options.add_size(parser)
    add_own_options(parser)
    options.add_mix_weight(parser)
    parser.add_argument(
        "--steps",
        type=options.integer(),
        nargs="+",
        default=list(STEPS),
        help="diffusion steps, one or more; an estimate is for the last, or for 50 if none is given",
    )
    parser.add_argument("--batch", type=options.integer(options.LARGEST_BATCH), default=1, help="images at once")
    parser.add_argument(
        "--repeats", type=options.integer(), default=2, help="how many gradients are timed; the fastest counts"
    )
    parser.add_argument("--against", help="baselines: naive, checkpoint and reference=DIR, separated by commas")
    parser.add_argument("--memory-budget", help='for memory="auto", e.g. 6GiB (default: what is free)')
    options.add_device(parser)
    parser.add_argument(
        "--out", type=options.folder, default=Path("profile"), help=f"folder for {FIGURE}, {TIMELINES}, {TABLE}"
    )


def run(args: argparse.Namespace) -> int:
    """Measures or estimates, prints the table, and writes the figures; gives the exit code."""
    steps = sorted(set(args.steps))
    if min(steps) < 1:
        raise ValueError(f"--steps: expected numbers of at least 1, got {min(steps)}")
    if args.estimate is not None:
        return _estimate(args, 50 if args.steps == list(STEPS) else steps[-1])
    if args.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {args.repeats}")
    from ..chain.memory.plan import format_bytes, parse_bytes
    from .baselines import label

    names = _names(args.against)
    options.check_folder(args.out)
    if args.batch < 1:
        raise ValueError(f"batch: expected an int of at least 1, got {args.batch}")
    if args.memory_budget is not None:
        parse_bytes(args.memory_budget)
    options.check_model(args.model)
    check_prompt(args, PROMPT)
    fill_guidance_scale(args)
    check_share("mix_weight", args.mix_weight)
    if args.resolution is not None:
        if args.height is not None or args.width is not None:
            raise ValueError("--resolution: expected none beside --height and --width, which say more")
        check_sizes(args, steps, ("resolution",), "--steps")
        args.height = args.width = args.resolution
    check_sizes(args, steps, SIDES, "--steps")
    setting = _setting(args, options.load_pipeline(args))
    print(f"{'':<22}{'steps':>6}{'peak':>12}{'held':>12}{'peak RSS':>12}{'seconds':>10}{'CPU s':>10}", flush=True)
    rows: list[Row] = []
    reports: dict[str, MemoryReport] = {}
    for name in names:
        for count in steps:
            row, reports[name] = measure(name, setting, count, args.repeats)
            rows.append(row)
            rss = "-" if row.rss is None else format_bytes(row.rss)
            cells = f"{format_bytes(row.peak):>12}{format_bytes(row.held):>12}{rss:>12}"
            cells += f"{row.seconds:>10.3g}{row.cpu_seconds:>10.3g}"
            print(f"{label(name):<22}{count:>6}{cells}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    _write(args, rows, reports)
    for name, growth in growths(rows).items():
        print(f"{label(name):<22}holds {format_bytes(growth)} more for each step")
    print(f"{FIGURE}, {TIMELINES} and {TABLE} in {args.out}")
    return 0


def _estimate(args: argparse.Namespace, steps: int) -> int:
    """Prints the estimate of a model that is not loaded."""
    sides = {side: args.resolution if getattr(args, side) is None else getattr(args, side) for side in SIDES}
    given = {**vars(args), **sides, "model": args.estimate, "steps": steps, "frames": None}
    return estimating.run(argparse.Namespace(**given))


def _names(against: str | None) -> list[str]:
    """The names of all baselines that are measured, ours included. Raises ValueError for an unknown one."""
    from .baselines import NAIVE, OURS, PER_STEP, REFERENCE

    others = [] if against is None else [name.strip() for name in against.split(",")]
    for name in others:
        if name not in (NAIVE, PER_STEP) and not name.startswith(REFERENCE + "="):
            raise ValueError(f"--against: expected some of {NAIVE}, {PER_STEP}, {REFERENCE}=DIR, got {name!r}")
    if len(set(others)) < len(others):
        raise ValueError(f"--against: expected every name once, got {against!r}")
    return [*others, *OURS]


def _setting(args: argparse.Namespace, pipeline: Any) -> Setting:
    """The model with its prompt, and the start, which all baselines share."""
    from .baselines import Setting

    chain = make_edict(args, pipeline, min(args.steps))
    return Setting(
        chain.denoiser,
        options.without_offset(pipeline.scheduler),
        args.mix_weight,
        chain.noise(batch=args.batch),
        args.memory_budget,
        timestep_options(args, pipeline),
    )


def measure(name: str, setting: Setting, steps: int, repeats: int = 1) -> tuple[Row, MemoryReport]:
    """Measures one baseline.

    It takes one gradient to warm up, then `repeats` gradients with a clock, then one under the memory tracker.

    Args:
        name: The baseline's name, as `make` takes it.
        setting: The model and the start.
        steps: The number of diffusion steps.
        repeats: How many gradients are timed.
    """
    import torch

    from ..chain.chain import Chain
    from ..chain.memory.profiling import profile
    from .baselines import make

    forward = make(name, setting, steps)

    def gradient(note: Callable[[], None] = lambda: None) -> None:
        x = setting.x.clone().requires_grad_()
        outputs = forward(x)
        note()
        # The reference's wrapper refuses torch.autograd.grad.
        (outputs[0].float().square().sum() + outputs[1].float().square().sum()).backward()

    def clocks() -> tuple[float, float]:
        if setting.x.device.type == "cuda":
            torch.cuda.synchronize(setting.x.device)
        return time.perf_counter(), time.process_time()

    gradient()
    _reset_rss()
    times = []
    for _ in range(repeats):
        began = clocks()
        gradient()
        times.append([now - then for now, then in zip(clocks(), began, strict=True)])
    seconds, cpu_seconds = (min(column) for column in zip(*times, strict=True))
    rss = _peak_rss()
    chain = getattr(forward, "chain", forward)
    watched = chain if isinstance(chain, Chain) else setting.chain(steps)
    between: list[int] = []
    with profile(watched, setting.x.device) as report:
        gradient(lambda: between.append(report.now()))
    return Row(name, steps, report.peak, between[0], rss, seconds, cpu_seconds), report


def _reset_rss() -> None:
    """Resets the peak of the resident set that Linux keeps for the process. Other systems have none."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_rss() -> int | None:
    """The peak of the process's resident set in bytes since the last reset, or None if the system does not tell it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def growths(rows: Sequence[Row]) -> dict[str, float]:
    """For each baseline, the bytes that every further step adds to what is held between the two passes."""
    found = {}
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        if len(own) > 1:
            found[name] = (own[-1].held - own[0].held) / (own[-1].steps - own[0].steps)
    return found


def _write(args: argparse.Namespace, rows: list[Row], reports: dict[str, MemoryReport]) -> None:
    """Writes the numbers and both figures."""
    import torch

    from .. import __version__
    from ..chain.memory.profiling import draw_timelines
    from .baselines import label

    result = {
        "rows": [asdict(row) for row in rows],
        "growth": growths(rows),
        "timelines": {name: report.as_dict() for name, report in reports.items()},
        "options": options.as_json(args),
        "versions": {"doodl_fast": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    files.write_json(args.out / TABLE, result)
    draw(args.out / FIGURE, rows, "seconds" if reports[rows[0].name].device.startswith("cuda") else "cpu_seconds")
    labelled = {label(name): report for name, report in reports.items()}
    files.replace(args.out / TIMELINES, lambda partial: draw_timelines(partial, labelled))


def draw(path: Path, rows: Sequence[Row], clock: str) -> None:
    """Draws the peak memory, on a logarithmic axis, and the time of a gradient against the number of steps.

    Args:
        path: The PNG file.
        rows: What was measured.
        clock: Which time is drawn: "seconds" or "cpu_seconds".
    """
    from matplotlib.figure import Figure

    from .baselines import OURS, label

    figure = Figure(figsize=(10, 4), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        steps = [row.steps for row in own]
        style = {"label": label(name), "marker": "o", "markersize": 4, "linestyle": "-" if name in OURS else "--"}
        memory.plot(steps, [row.peak / 2**20 for row in own], **style)
        seconds.plot(steps, [getattr(row, clock) for row in own], **style)
    most, least = (f(row.peak / 2**20 for row in rows) for f in (max, min))
    memory.set(ylabel="peak memory of a gradient, MiB", yscale="log")
    memory.set_ylim(10 ** math.floor(math.log10(least)), 10 ** math.ceil(math.log10(most)))
    seconds.set(ylabel=f"{clock.replace('cpu_', 'CPU ')} for a gradient", ylim=(0, None))
    for axes in (memory, seconds):
        axes.set(xlabel="diffusion steps")
        axes.grid(alpha=0.3)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside right")
    files.replace(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
