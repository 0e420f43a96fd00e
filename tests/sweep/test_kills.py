"""Two processes do a sweep, and one of them is killed again and again: nothing of it can be seen in the results.

The processes are forks of this one, which has loaded the networks, so that kills hit runs and not the loading. Only
kills of a process that holds a run count. By default there are at least 20, and
`DOODL_FAST_KILLS=200 pytest tests/sweep/test_kills.py` is the long form.
"""

from __future__ import annotations

import contextlib
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
from tqdm.auto import tqdm

from doodl_fast import cli, shapes
from doodl_fast.cli import options, sweep_runs
from doodl_fast.optimization.objective import Objective

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or torch.cuda.is_available(), reason="needs processes that are forked, without CUDA"
)
KILLS = int(os.environ.get("DOODL_FAST_KILLS", "20"))
STEPS = 2 * (6 + 1 + 3 * 6)
"""How many steps, or starts of a search and its last picture, the whole sweep has."""
CONFIG = {
    "prompts": ["a red star", "a blue circle"],
    "seeds": [0],
    "measures": ["shapes"],
    "guides": {"text": {"guidance": ["clip-text"], "num_cutouts": 2}},  # random cutouts: the random state counts
    "methods": {
        "none": {"kind": "none", "solver": "ddim"},
        "best": {"kind": "best-of", "best_of": 6, "solver": "ddim"},
        "one step": {"kind": "one-step", "one_step_scale": 3, "solver": "ddim"},
        "ddim": {"solver": "ddim"},
        "edict": {"solver": "edict", "perturbation_scale": 0.01},
        "noise": {"solver": "lcm", "variables": ["start", "noise"]},
    },
    "options": {
        "model": "shapes",
        "steps": 2,
        "height": 16,
        "width": 32,  # cutouts are 16 pixels wide, at random places
        "optimization_steps": 6,
        "grad_scale": 100,
        "momentum": 0.5,
    },
}


class Log:
    """Notes the run of every step that any process begins, in a file for each sweep."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.run = Path(), ""
        perform, evaluate, score = sweep_runs.Performer.__call__, Objective.evaluate, Objective.score

        def performed(performer: Any, run: Any, *rest: Any) -> Any:
            self.run = run.name
            return perform(performer, run, *rest)

        def evaluated(*args: Any) -> Any:
            self.note()
            return evaluate(*args)

        def scored(*args: Any) -> Any:
            if self.run.startswith("best_"):
                self.note()
            return score(*args)

        monkeypatch.setattr(sweep_runs.Performer, "__call__", performed)
        monkeypatch.setattr(Objective, "evaluate", evaluated)
        monkeypatch.setattr(Objective, "score", scored)

    def note(self) -> None:
        with open(self.file, "ab", buffering=0) as file:
            file.write(f"{self.run}\n".encode())

    def steps(self, out: Path) -> Counter[str]:
        """How many steps were begun of every run of a sweep."""
        return Counter(out.with_suffix(".log").read_text().split())

    def sweep(self, config: Path, out: Path) -> int:
        """Does a sweep in this process."""
        self.file = out.with_suffix(".log")
        return cli.main(["sweep", str(config), "--out", str(out), "--device", "cpu"])

    def process(self, config: Path, out: Path) -> Any:
        """A process that does a sweep, and has begun."""

        def child() -> None:
            sys.stdout = sys.stderr = open(out.with_suffix(".err"), "a")  # noqa: SIM115
            os._exit(self.sweep(config, out))

        process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
        process.start()
        return process


def contents(out: Path) -> dict[str, bytes]:
    """The tables, the gallery and, of every run, its result and pictures."""
    files = [out / name for name in ("results.csv", "gallery.html", "contact_sheet.png", "sweep.json")]
    files += [*out.glob("runs/*/*.png"), *out.glob("runs/*/result.json")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def held_a_run(out: Path, process: int) -> bool:
    """Whether a process had a run when it was killed."""
    for path in out.glob("claims/*"):
        with contextlib.suppress(OSError, ValueError):  # another process may just have finished the run
            if json.loads(path.read_text())["process"] == process:
                return True
    return False


def test_results_do_not_show_that_processes_were_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, models = shapes.load_pipeline(), shapes.load_clip()
    monkeypatch.setattr(options, "load_pipeline", lambda args: pipeline)
    monkeypatch.setattr(sweep_runs, "load_guide", lambda kind, args, device, dtype: models)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # no thread of tqdm's that a fork would find in any state
    config, log = tmp_path / "sweep.json", Log(monkeypatch)
    config.write_text(json.dumps(CONFIG))
    # In this process, which so imports whatever the others would spend their first second on.
    assert log.sweep(config, tmp_path / "alone") == 0
    expected, once = contents(tmp_path / "alone"), log.steps(tmp_path / "alone")
    assert len(expected) == 4 + 12 * 4 and sum(once.values()) == STEPS

    moments = random.Random(0)
    kills = rounds = lost = 0
    while kills < KILLS:
        out, here = tmp_path / f"round{rounds}", 0
        rounds += 1
        steady, deadline = log.process(config, out), time.monotonic() + 300
        while steady.is_alive():
            assert time.monotonic() < deadline, out.with_suffix(".err").read_text()
            victim = log.process(config, out)
            victim.join(moments.uniform(0.05, 0.8))
            if victim.is_alive():
                # Stopped first, so that nobody finishes or takes over the run between the look and the kill.
                os.kill(victim.pid, signal.SIGSTOP)
                time.sleep(0.01)
                here += held_a_run(out, victim.pid)
                os.kill(victim.pid, signal.SIGKILL)
            victim.join()
        steady.join()
        assert steady.exitcode == 0, out.with_suffix(".err").read_text()
        got = contents(out)
        assert got.keys() == expected.keys()
        assert not [name for name in expected if got[name] != expected[name]]
        # A kill loses at most one step of one run.
        again = sum((log.steps(out) - once).values())
        assert again <= here and not once - log.steps(out)
        assert not list(out.glob("claims")) and not list(out.glob("runs/**/.*.tmp"))
        kills, lost = kills + here, lost + again
        assert rounds < 100
    assert lost > KILLS / 10  # kills hit steps, and not only what is between them
    print(f"{kills} kills in {rounds} sweeps, {lost} steps done again")
