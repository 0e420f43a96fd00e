"""Two processes do a sweep, and one of them is killed again and again: nothing of it can be seen in the results.

The processes are forks of this one, which has loaded the networks, so that kills hit runs and not the loading. By
default there are 20 kills. `DOODL_FAST_KILLS=200 pytest tests/sweep/test_kills.py` is the long form.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from doodl_fast import cli, shapes
from doodl_fast.cli import options, sweep_runs
from doodl_fast.optimization.objective import Objective

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or torch.cuda.is_available(), reason="needs processes that are forked, without CUDA"
)
KILLS = int(os.environ.get("DOODL_FAST_KILLS", "20"))
LOG = "steps.log"
CONFIG = {
    "prompts": ["a red star", "a blue circle"],
    "seeds": [0],
    "measures": ["shapes"],
    "guides": {"text": {"guidance": ["clip-text"], "num_cutouts": 2}},  # random cutouts: the random state counts
    "methods": {
        "none": {"kind": "none", "solver": "ddim"},
        "best": {"kind": "best-of", "best_of": 3, "solver": "ddim"},
        "one step": {"kind": "one-step", "one_step_scale": 3, "solver": "ddim"},
        "ddim": {"solver": "ddim"},
        "edict": {"solver": "edict", "perturbation_scale": 0.01},
        "noise": {"solver": "lcm", "variables": ["start", "noise"]},
    },
    "options": {
        "model": "shapes",
        "steps": 2,
        "height": 16,
        "width": 16,
        "optimization_steps": 3,
        "grad_scale": 100,
        "momentum": 0.5,
    },
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "sweep.json"
    path.write_text(json.dumps(CONFIG))
    return path


def sweep(config: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that does a sweep, and notes every step that it begins in a file. It is not started yet."""
    log = out.parent / f"{out.name}.{LOG}"
    perform, evaluate, score = sweep_runs.Performer.__call__, Objective.evaluate, Objective.score
    current: list[str] = []

    def note() -> None:
        with open(log, "ab", buffering=0) as file:
            file.write(f"{current[-1]}\n".encode())

    def performed(self: Any, run: Any, *rest: Any) -> Any:
        current.append(run.name)
        return perform(self, run, *rest)

    def evaluated(*args: Any) -> Any:
        note()
        return evaluate(*args)

    def scored(*args: Any) -> Any:
        if current[-1].startswith("best_"):
            note()
        return score(*args)

    def child() -> None:
        sys.stdout = sys.stderr = open(log.with_suffix(".err"), "a")  # noqa: SIM115
        monkeypatch.setattr(sweep_runs.Performer, "__call__", performed)
        monkeypatch.setattr(Objective, "evaluate", evaluated)
        monkeypatch.setattr(Objective, "score", scored)
        os._exit(cli.main(["sweep", str(config), "--out", str(out), "--device", "cpu"]))

    return multiprocessing.get_context("fork").Process(target=child, daemon=True)


def contents(out: Path) -> dict[str, bytes]:
    """The tables, the gallery and, of every run, its result and pictures."""
    files = [out / name for name in ("results.csv", "gallery.html", "contact_sheet.png", "sweep.json")]
    files += [*out.glob("runs/*/*.png"), *out.glob("runs/*/result.json")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def steps(out: Path) -> Counter[str]:
    """How many steps, or starts of a search, were begun of every run, by all processes together."""
    return Counter((out.parent / f"{out.name}.{LOG}").read_text().split())


def test_results_do_not_show_that_processes_were_killed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, models = shapes.load_pipeline(), shapes.load_clip()
    monkeypatch.setattr(options, "load_pipeline", lambda args: pipeline)
    monkeypatch.setattr(sweep_runs, "load_guide", lambda kind, args, device, dtype: models)
    alone = sweep(config, tmp_path / "alone", monkeypatch)
    alone.start()
    alone.join(120)
    assert alone.exitcode == 0, (tmp_path / f"alone.{LOG}").with_suffix(".err").read_text()
    expected, once = contents(tmp_path / "alone"), steps(tmp_path / "alone")
    assert len(expected) == 4 + 12 * 4 and sum(once.values()) == 2 * (4 + 3 + 3 + 3)

    moments = random.Random(0)
    kills = rounds = lost = 0
    while kills < KILLS:
        out, here = tmp_path / f"round{rounds}", 0
        rounds += 1
        steady = sweep(config, out, monkeypatch)
        steady.start()
        while steady.is_alive():
            victim = sweep(config, out, monkeypatch)
            victim.start()
            victim.join(moments.uniform(0.03, 0.8))
            if victim.is_alive():
                os.kill(victim.pid, signal.SIGKILL)
                here += steady.is_alive()
            victim.join()
        steady.join()
        assert steady.exitcode == 0, (tmp_path / f"{out.name}.{LOG}").with_suffix(".err").read_text()
        got = contents(out)
        assert got.keys() == expected.keys()
        assert not [name for name in expected if got[name] != expected[name]]
        # A kill loses at most one step of one run.
        again = sum((steps(out) - once).values())
        assert again <= here + 1 and not once - steps(out)
        lost += again
        assert not list(out.glob("claims")) and not list(out.glob("runs/**/.*.tmp"))
        kills += here
        assert rounds < 60
    assert lost > KILLS / 10  # kills hit steps, and not only what is between them
    print(f"{kills} kills in {rounds} sweeps, {lost} steps done again, {time.process_time():.0f} s of CPU time here")
