"""What a sweep costs beyond its runs, in CPU seconds: ``python bench/sweep.py --out FOLDER``.

The same runs of a tiny chain are done twice, in turns of a few, in one process: by a plain loop of `from_pipeline`,
`optimize(..., folder=)` and `save`, and by the sweep, with its claims, results, progress bar, judge, table, gallery and
contact sheet. Networks are loaded beforehand for both. Then the time is measured in which the finished folder is read.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch

import doodl_fast
from doodl_fast import shapes
from doodl_fast.cli import options
from doodl_fast.cli.sweep import Bar
from doodl_fast.cli.sweep_options import check
from doodl_fast.cli.sweep_runs import Performer
from doodl_fast.sweep import Run, expand, read_rows, work
from doodl_fast.sweep.report import GALLERY, TABLE, write_report

STEPS, UPDATES, SIDE = 2, 2, 16


def configuration(runs: int) -> dict[str, Any]:
    """A sweep of so many runs, of a chain of two steps on pictures of 16 pixels."""
    given = {"steps": STEPS, "optimization_steps": UPDATES, "height": SIDE, "width": SIDE, "guidance_scale": 4.0}
    return {
        "prompts": ["a red circle", "a blue star", "a green square", "a purple circle", "a red star"],
        "seeds": runs // 5,
        "guides": ["symmetry"],
        "methods": ["ddim"],
        "measures": ["shapes"],
        "options": {"model": "shapes", **given},
    }


def alone(run: Run, pipeline: Any, folder: Path) -> None:
    """A run without a sweep, as somebody would write it."""
    torch.manual_seed(run.seed)
    # "auto", the default in Python, measures the memory of every chain; the command line's default is "checkpoint".
    chain = doodl_fast.DDIM.from_pipeline(
        pipeline, run.prompt, None, STEPS, guidance_scale=4.0, memory="checkpoint", height=SIDE, width=SIDE
    )
    first = []
    result = doodl_fast.optimize(
        chain,
        chain.noise(seed=run.seed),
        chain.decode,
        doodl_fast.guidance.Symmetry(),
        UPDATES,
        seed=run.seed,
        progress=False,
        folder=folder / "state",
        callback_on_step_end=lambda info: first.append(info.images[0]) if info.step == 0 else None,  # type: ignore[func-returns-value]
    )
    for name, image in (("before", first[0]), ("after", result.images[0]), ("best", result.best_images[0])):
        image.save(folder / f"{name}.png")  # type: ignore[attr-defined]
    (folder / "losses.json").write_text(json.dumps([*result.losses, result.final_loss]))


def measure(runs: int, block: int, out: Path) -> dict[str, Any]:
    """Does all runs both ways, and returns the CPU seconds of each and what the sweep takes more."""
    torch.set_num_threads(1)
    plan = expand(configuration(runs))
    pipeline = shapes.load_pipeline()
    options.load_pipeline = lambda args: pipeline
    performer = Performer(plan.measures, "cpu")
    for name, run in (("warm", plan.runs[0]), ("warmer", plan.runs[1])):  # caches of PyTorch, for both
        (out / name / "sweep").mkdir(parents=True)
        alone(run, pipeline, out / name)
        performer(run, out / name / "sweep", lambda: None)
    seconds = {"plain loop": 0.0, "sweep": 0.0, "of which report": 0.0}
    began = time.process_time()
    check(plan.runs, "cpu")
    plan.store(out / "sweep")
    seconds["sweep"] += time.process_time() - began
    with Bar(runs, 0) as bar:
        for first in range(0, runs, block):
            part = plan.runs[first : first + block]
            for way in ("plain loop", "sweep") if first // block % 2 else ("sweep", "plain loop"):
                began = time.process_time()
                if way == "sweep":
                    work(out / "sweep", part, performer, progress=lambda done, first=first: bar.update(first + done))
                else:
                    for run in part:
                        alone(run, pipeline, out / "plain" / run.name)
                seconds[way] += time.process_time() - began
    for path in (out / "plain").glob("*/*.png"):
        if path.read_bytes() != (out / "sweep" / "runs" / path.parent.name / path.name).read_bytes():
            raise AssertionError(f"{path}: the two ways made different pictures")
    began = time.process_time()
    write_report(out / "sweep", plan)
    seconds["of which report"] = time.process_time() - began
    seconds["sweep"] += seconds["of which report"]
    return {"runs": runs, **seconds, "overhead": seconds["sweep"] / seconds["plain loop"] - 1, **opening(out / "sweep")}


def opening(folder: Path) -> dict[str, float]:
    """How long it takes to read the table and all results of a finished sweep, and the size of its gallery."""
    began = time.perf_counter()
    with open(folder / TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    table = time.perf_counter() - began
    began = time.perf_counter()
    read_rows(folder)
    return {
        "rows": len(rows),
        "seconds to read the table": table,
        "seconds to read all results": time.perf_counter() - began,
        "bytes of the gallery": (folder / GALLERY).stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--runs", type=int, default=500, help="a multiple of 5")
    parser.add_argument("--block", type=int, default=25, help="how many runs are done in one turn")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    print(json.dumps(measure(args.runs, args.block, args.out), indent=1))


if __name__ == "__main__":
    main()
