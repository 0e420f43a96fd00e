"""The table of a sweep: one row for each run, read from the runs' folders."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_bytes
from .plan import RUNS, Plan, Run
from .worker import ERROR, RESULT, TIMING, read_json

ABOUT = ("run", "prompt", "seed", "guide", "method", "setting", "status")
NUMBERS = ("loss_before", "loss_after", "loss_best", "best_step", "steps", "distance")
LAST = ("error",)
TIMES = ("seconds", "cpu_seconds", "resumed", "machine")
DONE, FAILED, PENDING = "done", "failed", "pending"
COLUMNS = (*ABOUT, *NUMBERS, *LAST, *TIMES)
"""Names that no measure may have."""
Row = dict[str, Any]


def read_rows(folder: Path, plan: Plan | None = None) -> list[Row]:
    """Reads what has become of every run of a sweep.

    Args:
        folder: Of the sweep.
        plan: What it consists of; None reads it from the folder.

    Returns:
        For each run a dict with its name and its part of the plan, its status ("done", "failed" or "pending"), and for
        a run that is done its losses, the distance of its pictures and its measures. `losses` has the loss of every
        step, and `timing` what the run took. Everything but `timing` depends on the run alone.

    Raises:
        ValueError: A file is missing or damaged.
    """
    plan = plan or Plan.load(folder)
    return [_row(folder / RUNS / run.name, run) for run in plan.runs]


def _row(place: Path, run: Run) -> Row:
    """The row of one run."""
    about = {name: getattr(run, name) for name in ABOUT[1:-1]}
    row: Row = {"run": run.name, **about, "status": PENDING, "losses": [], "timing": {}, "measures": {}, "error": ""}
    result = read_json(place / RESULT)
    if result is not None:
        losses = result.get("losses") or []
        numbers = {name: result.get(name) for name in NUMBERS} | {"steps": len(losses) - 1}
        measures = result.get("measures") or {}
        timing = read_json(place / TIMING) or {}
        return {**row, **numbers, "status": DONE, "losses": losses, "measures": measures, "timing": timing}
    error = read_json(place / ERROR)
    if error is not None:
        row |= {"status": FAILED, "error": f"{error.get('type')}: {error.get('error')}"}
    return row


def measure_names(rows: Sequence[Row]) -> list[str]:
    """The names of all measures, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row["measures"]))


def columns(rows: Sequence[Row]) -> list[str]:
    """The names of the table's columns."""
    return [*ABOUT, *NUMBERS, *measure_names(rows), *LAST]


def value(row: Mapping[str, Any], column: str) -> Any:
    """A row's entry in a column; None where it has none."""
    return row["measures"].get(column) if column in row["measures"] else row.get(column)


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """The table as a CSV file, without what the runs took, which differs from time to time."""
    names = columns(rows)
    return _csv(names, ([value(row, name) for name in names] for row in rows))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes the table."""
    write_bytes(path, csv_bytes(rows))


def write_timings(path: Path, rows: Sequence[Row]) -> None:
    """Writes what each run took in the process that finished it."""
    done = [row for row in rows if row["timing"]]
    values = ([row["run"], *(row["timing"].get(name) for name in TIMES)] for row in done)
    write_bytes(path, _csv(["run", *TIMES], values))


def write_parquet(path: Path, rows: Sequence[Row]) -> bool:
    """Writes the table as Parquet if pyarrow is there, and says whether it is."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return False
    table = pyarrow.table({name: [value(row, name) for row in rows] for name in columns(rows)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())
    return True


def _csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV file. Numbers are written so that reading them gives the same ones."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue().encode()
