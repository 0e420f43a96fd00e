"""What happens to the runs of a sweep: done once, failed, left to others, and what the table says of them."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from doodl_fast.optimization.folder_lock import FolderInUse
from doodl_fast.sweep import Plan, Run, expand, read_rows, work
from doodl_fast.sweep.claims import ClaimLost, Claims
from doodl_fast.sweep.files import remove_partial
from doodl_fast.sweep.report import write_report
from doodl_fast.sweep.table import columns, write_parquet
from doodl_fast.sweep.worker import CLAIMS, forget_errors


@pytest.fixture
def plan() -> Plan:
    return expand({"prompts": ["a", "b"], "seeds": 3, "guides": {"g": {}}, "methods": {"m": {}, "n": {}}})


def outcome(run: Run, place: Path, check: Callable[[], None]) -> dict[str, Any]:
    """A run that is done at once."""
    check()
    for number, name in enumerate(("before", "after", "best")):
        Image.new("RGB", (8, 8), (40 * run.seed, 100 * number, 9)).save(place / f"{name}.png")
    losses = [1.0, 0.1 + run.seed]
    numbers = {"loss_before": 1.0, "loss_after": losses[1], "loss_best": min(losses), "best_step": 1, "distance": 0.25}
    return {**numbers, "losses": losses, "measures": {"right": 1.0}}


def test_every_run_is_done_once_and_listed(plan: Plan, tmp_path: Path) -> None:
    plan.store(tmp_path)
    seen: list[int] = []
    names: list[str] = []

    def perform(run: Run, place: Path, check: Callable[[], None]) -> dict[str, Any]:
        names.append(run.name)
        return outcome(run, place, check)

    found = work(tmp_path, plan.runs, perform, progress=seen.append)
    assert (found.finished, found.failed, found.left) == (12, [], 0)
    assert names == [run.name for run in plan.runs] and seen == list(range(1, 13))
    assert not (tmp_path / CLAIMS).exists()
    assert work(tmp_path, plan.runs, perform).finished == 0 and len(names) == 12
    write_report(tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == names
    assert list(rows[0]) == columns(read_rows(tmp_path))
    assert [float(row["loss_after"]) for row in rows[:3]] == [0.1, 1.1, 2.1]  # to the last digit
    assert rows[4]["seed"] == "1" and rows[0]["right"] == "1.0" and rows[0]["steps"] == "1"
    with open(tmp_path / "timings.csv", newline="") as file:
        times = list(csv.DictReader(file))
    assert [row["run"] for row in times] == names and all(float(row["seconds"]) > 0 for row in times)
    assert {row["resumed"] for row in times} == {"False"}


def test_a_failed_run_is_named_and_the_others_go_on(plan: Plan, tmp_path: Path) -> None:
    plan.store(tmp_path)
    broken = plan.runs[2].name

    def perform(run: Run, place: Path, check: Callable[[], None]) -> dict[str, Any]:
        if run.name == broken:
            raise FloatingPointError("loss: expected a finite\n number")
        return outcome(run, place, check)

    found = work(tmp_path, plan.runs, perform)
    assert found.finished == 12 and found.failed == [broken]
    row = next(row for row in write_report(tmp_path) if row["run"] == broken)
    assert row["status"] == "failed" and row["error"] == "FloatingPointError: loss: expected a finite number"
    assert "perform" in json.loads((tmp_path / "runs" / broken / "error.json").read_text())["traceback"]
    assert "failed" in (tmp_path / "results.csv").read_text()
    assert work(tmp_path, plan.runs, outcome).finished == 0  # not again unless that is asked for
    assert forget_errors(tmp_path, plan.runs) == 1
    again = work(tmp_path, plan.runs, outcome)
    assert again.finished == 1 and not again.failed


@pytest.mark.parametrize("error", [ClaimLost("gone"), FolderInUse("folder: in use")])
def test_a_run_that_another_process_still_does_is_left_to_it(plan: Plan, tmp_path: Path, error: Exception) -> None:
    calls: list[str] = []

    def perform(run: Run, place: Path, check: Callable[[], None]) -> dict[str, Any]:
        calls.append(run.name)
        if len(calls) == 1:
            raise error
        return outcome(run, place, check)

    found = work(tmp_path, plan.runs[:2], perform)
    assert found.finished == 2 and not found.failed
    assert calls == [plan.runs[0].name, plan.runs[1].name, plan.runs[0].name]


def test_runs_of_living_processes_are_not_waited_for(plan: Plan, tmp_path: Path) -> None:
    claims = Claims(tmp_path / CLAIMS)
    theirs = claims.take(plan.runs[0].name)
    assert theirs is not None
    found = work(tmp_path, plan.runs, outcome, wait=False)
    assert (found.finished, found.left) == (11, 1) and (tmp_path / CLAIMS).exists()
    theirs.release(done=False)
    assert work(tmp_path, plan.runs, outcome, wait=False).finished == 1


def test_a_run_that_another_process_has_finished_meanwhile_is_dropped(plan: Plan, tmp_path: Path) -> None:
    def perform(run: Run, place: Path, check: Callable[[], None]) -> dict[str, Any]:
        (place / "result.json").write_text('{"run": "theirs"}')
        check()
        raise AssertionError

    found = work(tmp_path, plan.runs[:1], perform)
    assert found.finished == 0 and not found.failed
    assert "theirs" in (tmp_path / "runs" / plan.runs[0].name / "result.json").read_text()


def test_an_interruption_leaves_the_run_to_the_next_process(plan: Plan, tmp_path: Path) -> None:
    def interrupted(run: Run, place: Path, check: Callable[[], None]) -> dict[str, Any]:
        (place / ".half.png.0123.tmp").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, plan.runs, interrupted)
    assert work(tmp_path, plan.runs, outcome, wait=False).finished == 12
    assert not list(tmp_path.glob("runs/*/.*"))
    assert json.loads((tmp_path / "runs" / plan.runs[0].name / "timing.json").read_text())["resumed"]


def test_unfinished_files_of_others_are_kept_for_a_while(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.tmp", tmp_path / ".b.tmp"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    remove_partial(tmp_path, 3600)
    assert [path.name for path in tmp_path.iterdir()] == [".b.tmp"]


def test_the_report_of_the_last_process_has_all_runs(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes its last run while this one writes the report, and has written its own before."""
    from doodl_fast.sweep import report

    plan.store(tmp_path)
    work(tmp_path, plan.runs[:11], outcome)
    real, calls = report.write_gallery, []

    def late(*args: Any) -> None:
        calls.append(work(tmp_path, plan.runs, outcome).finished)
        real(*args)

    monkeypatch.setattr(report, "write_gallery", late)
    rows = write_report(tmp_path, plan)
    assert calls == [1, 0] and all(row["status"] == "done" for row in rows)
    assert "pending" not in (tmp_path / "results.csv").read_text()


def test_nothing_is_written_where_nothing_has_changed(plan: Plan, tmp_path: Path) -> None:
    plan.store(tmp_path)
    work(tmp_path, plan.runs, outcome)
    write_report(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write_report(tmp_path, only_if_changed=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "gallery.html").unlink()
    write_report(tmp_path, only_if_changed=True)
    assert (tmp_path / "gallery.html").exists()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_result_is_named(plan: Plan, tmp_path: Path, text: str) -> None:
    place = tmp_path / "runs" / plan.runs[0].name
    place.mkdir(parents=True)
    (place / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result.json' is damaged .*; delete it, and the run is done again"):
        read_rows(tmp_path, plan)


def test_parquet_has_the_same_table(plan: Plan, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    work(tmp_path, plan.runs, outcome)
    rows = read_rows(tmp_path, plan)
    assert write_parquet(tmp_path / "a.parquet", rows)
    table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert list(table) == columns(rows) and table["loss_after"] == [row["loss_after"] for row in rows]
