"""Means of a sweep by method, with bootstrap intervals, and differences between methods on the same prompt and seed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .table import DONE, Row, measure_names, value

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEVEL, RESAMPLES = 0.95, 9999
SECONDS = "seconds"
BATCH = 10**7
"""How many random indices are drawn at once."""


@dataclass(frozen=True)
class Interval:
    """A mean with its interval.

    Attributes:
        mean: Of all values.
        low: The lower end.
        high: The upper end.
        count: How many values there are.
        units: How many independent units were drawn from: prompts, or runs.
    """

    mean: float
    low: float
    high: float
    count: int
    units: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_mean(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """A percentile bootstrap interval of a mean (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13).

    Args:
        values: The values.
        groups: For each value what it belongs to, a prompt for instance. Whole groups are drawn, because values of one
            group are not independent: pictures of one prompt succeed or fail together. None draws single values.
        seed: Of the draws.
        resamples: How many there are.
        level: The share of draws within the interval.

    Returns:
        The interval. With a single unit it is infinite, as nothing is known of the spread.

    Raises:
        ValueError: There are no values, or not a group for each.
    """
    import numpy as np

    if not len(values):
        raise ValueError("values: expected at least one, got none")
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"groups: expected one for each of the {len(values)} values, got {len(groups)}")
    sums, counts = _grouped(np.asarray(values, dtype=float), groups)
    mean = float(np.sum(sums) / np.sum(counts))
    units = len(sums)
    if units == 1:
        return Interval(mean, -np.inf, np.inf, len(values), 1)
    generator = np.random.default_rng(seed)
    means = []
    for first in range(0, resamples, max(1, BATCH // units)):
        drawn = generator.integers(0, units, (min(max(1, BATCH // units), resamples - first), units))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(values), units)


def _grouped(values: NDArray[np.float64], groups: Sequence[Hashable] | None) -> tuple[Any, Any]:
    """The sum and the number of the values of each group."""
    import numpy as np

    if groups is None:
        return values, np.ones(len(values))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[group] for group in groups])
    return np.bincount(index, values), np.bincount(index).astype(float)


def paired_differences(
    rows: Iterable[Row], column: str, method: str, baseline: str, **options: Any
) -> tuple[Interval, list[float]] | None:
    """How much a method differs from another one on the same prompts, seeds, guides and settings.

    Args:
        rows: Of `read_rows`.
        column: What is compared: a number or a measure of the table.
        method: The method.
        baseline: The one that it is compared with.
        **options: Of `bootstrap_mean`.

    Returns:
        The mean of method less baseline, and all differences. Whole prompts are drawn if there are several. None if no
        pair of runs is done.
    """
    pairs: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        number = number_of(row, column)
        if number is not None:
            pairs.setdefault((row["prompt"], row["seed"], row["guide"], row["setting"]), {})[row["method"]] = number
    both = {key: found for key, found in pairs.items() if method in found and baseline in found}
    if not both:
        return None
    differences = [found[method] - found[baseline] for found in both.values()]
    return bootstrap_mean(differences, units_of([key[0] for key in both]), **options), differences


def units_of(prompts: Sequence[str]) -> Sequence[str] | None:
    """The groups that are drawn: prompts if there are several, and otherwise None, for runs."""
    return prompts if len(set(prompts)) > 1 else None


def number_of(row: Row, column: str) -> float | None:
    """A run's number in a column; None if it has none. Times count for runs that were never interrupted alone."""
    if row["status"] != DONE:
        return None
    if column == SECONDS:
        return None if row["timing"].get("resumed") else row["timing"].get(SECONDS)
    found = value(row, column)
    return float(found) if isinstance(found, (int, float)) else None


def summarise(rows: Sequence[Row], baseline: str | None = None, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What `doodl-fast summarise` shows.

    Args:
        rows: Of `read_rows`.
        baseline: The method that others are compared with. None is the first one.
        columns: The numbers that are summarised. None given are the last loss, all measures, distance and seconds.

    Returns:
        One dict for each column, guide, setting and method: its mean with its interval, and its difference from the
        baseline, None for the baseline itself.

    Raises:
        ValueError: There is no such method or column, or no run is done.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if not any(row["status"] == DONE for row in rows):
        raise ValueError(f"sweep: expected runs that are done, got {len(rows)} of which none is")
    baseline = methods[0] if baseline is None else baseline
    if baseline not in methods:
        raise ValueError(f"--baseline: expected one of {', '.join(methods)}, got {baseline!r}")
    known = ["loss_before", "loss_after", "loss_best", "best_step", "steps", "distance", SECONDS, *measure_names(rows)]
    wrong = next((name for name in columns if name not in known), None)
    if wrong is not None:
        raise ValueError(f"--columns: expected some of {', '.join(known)}, got {wrong!r}")
    found = []
    for column in columns or ["loss_after", *measure_names(rows), "distance", SECONDS]:
        for guide, setting in dict.fromkeys((row["guide"], row["setting"]) for row in rows):
            some = [row for row in rows if (row["guide"], row["setting"]) == (guide, setting)]
            for method in methods:
                entry = _entry(some, column, method, baseline)
                if entry is not None:
                    found.append({"column": column, "guide": guide, "setting": setting, "method": method, **entry})
    return found


def _entry(rows: Sequence[Row], column: str, method: str, baseline: str) -> dict[str, Any] | None:
    """The mean of a method's runs, and its difference from the baseline; None if none is done."""
    own = [(number_of(row, column), row["prompt"]) for row in rows if row["method"] == method]
    known = [(number, prompt) for number, prompt in own if number is not None]
    if not known:
        return None
    numbers, prompts = [number for number, _ in known], [prompt for _, prompt in known]
    differs = None if method == baseline else paired_differences(rows, column, method, baseline)
    return {
        "mean": asdict(bootstrap_mean(numbers, units_of(prompts))),
        "difference": None if differs is None else asdict(differs[0]),
    }


def as_text(found: Sequence[dict[str, Any]], baseline: str) -> str:
    """A table of what `summarise` returns for the terminal, which is Markdown too."""
    lines: list[str] = []
    for column in dict.fromkeys(entry["column"] for entry in found):
        some = [entry for entry in found if entry["column"] == column]
        kinds = dict.fromkeys((entry["guide"], entry["setting"]) for entry in some)
        lines += [f"## {column.replace('_', ' ')}", ""]
        lines += [f"| | method | runs (drawn) | mean, 95% interval | less {baseline}, same prompt and seed |"]
        lines += ["|---|---|---|---|---|"]
        for guide, setting in kinds:
            for entry in some:
                if (entry["guide"], entry["setting"]) != (guide, setting):
                    continue
                mean, differs = Interval(**entry["mean"]), entry["difference"]
                about = " ".join(filter(None, (guide, setting)))
                against = "" if differs is None else str(Interval(**differs))
                lines.append(f"| {about} | {entry['method']} | {mean.count} ({mean.units}) | {mean} | {against} |")
        lines.append("")
    return "\n".join(lines)
