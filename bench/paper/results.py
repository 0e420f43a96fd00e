"""Means, intervals and differences of a folder of results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from doodl_fast.sweep.summary import Interval, bootstrap_mean

from .methods import METHODS
from .runner import SETTING, read_chunks, tuning

COLUMNS = ("success", "shows", "score", "loss", "diversity", "distance")
"""What is shown of every method, from its rows."""
UNPAID = ("none", "cfg")
"""Methods that do not spend the budget."""


@dataclass(frozen=True)
class Results:
    """What a folder holds.

    Attributes:
        about: The setting, the machine and the aesthetic head.
        chunks: The chunks of the test split by task and method; a method without any is left out.
        tuning: What was tried, by task and method.
    """

    about: dict[str, Any]
    chunks: dict[str, dict[str, list[dict[str, Any]]]]
    tuning: dict[str, dict[str, list[dict[str, float]]]]

    @classmethod
    def read(cls, out: Path) -> Results:
        """Reads a folder that the runner has written, complete or not.

        Raises:
            FileNotFoundError: There are no results in it.
        """
        path = out / SETTING
        if not path.exists():
            raise FileNotFoundError(f"{str(out)!r}: expected a folder of `python -m bench.paper run`, got no {SETTING}")
        about = json.loads(path.read_text())
        names = about["setting"]["tasks"], about["setting"]["methods"]
        chunks = {task: {m: c for m in names[1] if (c := read_chunks(out, task, m, "test"))} for task in names[0]}
        tried = {task: {m: tuning(out, task, m) for m in found} for task, found in chunks.items()}
        return cls(about, {task: found for task, found in chunks.items() if found}, tried)

    @property
    def tasks(self) -> list[str]:
        return list(self.chunks)

    def methods(self, task: str) -> list[str]:
        return list(self.chunks[task])

    def machines(self, task: str) -> list[dict[str, Any]]:
        """Where a task's test split was run. Chunks that do not say it were run where the folder was begun."""
        found = []
        for chunks in self.chunks[task].values():
            for chunk in chunks:
                machine = chunk.get("machine", self.about["machine"])
                if machine not in found:
                    found.append(machine)
        return found

    def rows(self, task: str, method: str) -> list[dict[str, Any]]:
        """The rows of the test split."""
        return [row for chunk in self.chunks[task].get(method, []) for row in chunk["rows"]]

    def values(self, task: str, method: str, column: str, place: int = -1) -> dict[tuple[Any, ...], float]:
        """A column by (task, prompt, variety, seed), at a checkpoint."""
        found = {}
        for row in self.rows(task, method):
            value = row[column]
            value = value[place] if isinstance(value, list) else value
            if value is not None:
                found[(task, row["prompt"], row["variety"], row["seed"])] = float(value)
        return found

    def cost(self, task: str, method: str) -> dict[str, float | None]:
        """What one picture costs: calls, forward and backward, evaluations, seconds, and the largest peak."""
        chunks = self.chunks[task][method]
        samples = sum(chunk["samples"] for chunk in chunks)
        seconds = sum(chunk["pace"] * chunk["evaluations"] for chunk in chunks) / samples
        peaks = [chunk["peak"] for chunk in chunks if chunk["peak"] is not None]
        first = chunks[0]
        return {
            **{name: first[name] for name in ("forward", "backward", "evaluations")},
            "calls": first["forward"] + first["backward"],
            "seconds": seconds,
            "peak": max(peaks) if peaks else None,
            "batch": max(chunk["samples"] for chunk in chunks),
        }

    def equal_seconds(self, task: str) -> tuple[float, dict[str, tuple[int, float, dict[tuple[Any, ...], float]]]]:
        """Success at equal seconds: those that the fastest method needs for its budget of calls.

        Returns:
            These seconds for a picture, and for each method that has a checkpoint by then (the calls at its last one,
            its seconds, its successes).
        """
        paid = [method for method in self.methods(task) if method not in UNPAID]
        limit = min(float(self.cost(task, method)["seconds"] or 0) for method in paid)
        found = {}
        for method in paid:
            chunks, values = self.chunks[task][method], {}
            samples = sum(chunk["samples"] for chunk in chunks)
            pace = sum(chunk["pace"] for chunk in chunks) / samples
            marks = chunks[0]["checkpoints"]
            # A little more than the limit is rounding of the fastest method's own seconds.
            places = [i for i, mark in enumerate(marks) if mark["evaluations"] * pace <= limit * 1.001]
            if places:
                values = self.values(task, method, "success", places[-1])
                mark = marks[places[-1]]
                found[method] = (mark["calls"], mark["evaluations"] * pace, values)
        return limit, found


def interval(values: dict[tuple[Any, ...], float]) -> Interval:
    """The mean with its interval, for which whole prompts are drawn."""
    return bootstrap_mean(list(values.values()), [key[:2] for key in values])


def difference(a: dict[tuple[Any, ...], float], b: dict[tuple[Any, ...], float]) -> Interval | None:
    """The mean of a less b on the same cases and seeds; None if they have none in common."""
    both = {key: a[key] - b[key] for key in a if key in b}
    return interval(both) if both else None


def pooled(results: Results, method: str, column: str) -> dict[tuple[Any, ...], float]:
    """A column over all tasks."""
    found: dict[tuple[Any, ...], float] = {}
    for task in results.tasks:
        found |= results.values(task, method, column)
    return found


def title(method: str) -> str:
    return METHODS[method].title


def compact(results: Results) -> dict[str, Any]:
    """The means, costs and tuning of all methods, and the rows in columns, for a small JSON file."""
    found: dict[str, Any] = {**results.about, "tasks": {}}
    for task in results.tasks:
        methods = {}
        for method in results.methods(task):
            rows = results.rows(task, method)
            means = {}
            for column in COLUMNS:
                values = results.values(task, method, column)
                if values:
                    one = interval(values)
                    means[column] = [_short(n) for n in (one.mean, one.low, one.high)]
            columns: dict[str, list[Any]] = {"first": [row["first"] for row in rows]}
            columns |= {c: [row[c][-1] if isinstance(row[c], list) else row[c] for row in rows] for c in COLUMNS}
            methods[method] = {
                "cost": {k: None if v is None else _short(v) for k, v in results.cost(task, method).items()},
                "tuning": results.tuning[task][method],
                "means": means,
                "rows": {name: [None if v is None else _short(v) for v in values] for name, values in columns.items()},
            }
        some = results.rows(task, results.methods(task)[0])
        keys = [[row["prompt"], row["variety"], row["seed"]] for row in some]
        found["tasks"][task] = {"keys": keys, "methods": methods}
    return found


def _short(value: float) -> float | None:
    """Four digits; None for what is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
