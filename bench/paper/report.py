"""Writes what a folder of results says: docs/results/paper.md with its figures, and a small JSON file beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from doodl_fast.sweep.summary import Interval

from . import tasks
from .methods import FEW_STEPS, STEPS, STRONG
from .results import UNPAID, Results, compact, difference, interval, pooled, title

PAGE, DATA, PAGE_TEMPLATE = "paper.md", "paper.json", "page.md"


def write(out: Path, to: Path) -> str:
    """Makes the page, the figures and the JSON file of a folder of results. Returns the page's text."""
    results = Results.read(out)
    if not results.tasks:
        raise ValueError(f"{str(out)!r}: expected finished chunks of the test split, got none; run more of it")
    to.mkdir(parents=True, exist_ok=True)
    tables = []
    for task in results.tasks:
        figure = f"paper-{task}.png"
        _figure(results, task, to / figure)
        tables.append(_task(results, task, figure))
    parts = {"statements": _statements(results), "tables": "\n\n".join(tables), "tuning": _tuning(results)}
    template = (Path(__file__).parent / PAGE_TEMPLATE).read_text(encoding="utf-8")
    text = template.format(**_numbers(results), **{name: part.strip() for name, part in parts.items()})
    (to / PAGE).write_text(text, encoding="utf-8")
    (to / DATA).write_text(json.dumps(compact(results), separators=(",", ":")) + "\n", encoding="utf-8")
    return text


def _percent(one: Interval) -> str:
    return f"{one.mean:.0%} [{_bound(one.low):.0%}, {_bound(one.high, 1):.0%}]"


def _bound(value: float, otherwise: float = 0.0) -> float:
    """An end of an interval; that of one prompt is infinite."""
    return value if value - value == 0 else otherwise


def _number(one: Interval) -> str:
    return f"{one.mean:.3g} [{one.low:.3g}, {one.high:.3g}]"


def _points(one: Interval | None) -> str:
    """A difference of shares in points of a hundred."""
    return "" if one is None else f"{100 * one.mean:+.0f} [{100 * one.low:+.0f}, {100 * one.high:+.0f}]"


def _verdict(one: Interval) -> str:
    if one.low > 0:
        return "better"
    return "worse" if one.high < 0 else "not told apart"


def _numbers(results: Results) -> dict[str, Any]:
    """What the page says of the runs as a whole."""
    setting, machine, head = (results.about[name] for name in ("setting", "machine", "head"))
    own = {name: setting[name] for name in ("prompts", "seeds", "budget", "drawn")}
    pictures = sum(len(results.rows(task, m)) for task in results.tasks for m in results.methods(task))
    options = f" {results.about['options']}".rstrip()
    chains = {"steps": STEPS, "few": FEW_STEPS, "strong": STRONG}
    about = {"device": machine["device"], "torch": machine["torch"], "r2": head["r2"]}
    missing = [
        f"{task} ({len(results.chunks.get(task, {}))} of {len(setting['methods'])} methods)"
        for task in setting["tasks"]
        if len(results.chunks.get(task, {})) < len(setting["methods"])
    ]
    left = f"\n**Not complete:** {', '.join(missing)}; the same command goes on.\n" if missing else ""
    return {**own, **chains, **about, "pictures": pictures, "options": options, "left": left}


QUESTIONS = (
    ("Does DOODL beat one-step guidance at equal calls?", ("doodl", "edict"), "onestep"),
    ("Is EDICT worth its double cost over DDIM, with the same update?", ("edict",), "ddim"),
    (
        "Is a gradient worth more than as many random starts?",
        ("doodl", "ddim", "obelm", "dno", "reno", "onestep"),
        "best",
    ),
)


def _statements(results: Results) -> str:
    lines = ["## What follows from the intervals", ""]
    for question, methods, baseline in QUESTIONS:
        lines += [f"**{question}** Difference of success in points, same prompt and seed:", ""]
        lines += ["| less " + title(baseline) + " | " + " | ".join([*results.tasks, "together"]) + " |"]
        lines += ["|---" * (len(results.tasks) + 2) + "|"]
        for method in methods:
            cells = []
            for task in [*results.tasks, None]:
                pair = [
                    results.values(task, m, "success") if task else pooled(results, m, "success")
                    for m in (method, baseline)
                ]
                one = difference(*pair)
                cells.append("" if one is None else f"{_points(one)}: {_verdict(one)}")
            lines.append(f"| {title(method)} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["**Which method for which task?**", ""]
    lines += [f"- {task}: {_best(results, task)}" for task in results.tasks]
    lines += ["", "**Where guide and judge part**, by the difference from what nothing guides:", "", *_parted(results)]
    return "\n".join(lines)


def _best(results: Results, task: str) -> str:
    values = {method: results.values(task, method, "success") for method in results.methods(task)}
    means = {method: interval(found) for method, found in values.items() if found}
    best = max(means, key=lambda method: means[method].mean)
    others = []
    for method in means:
        one = difference(values[best], values[method])
        if method != best and one is not None and one.low <= 0:
            others.append(title(method))
    same = f"; not told apart from it: {'; '.join(others)}" if others else ", better than each of the others"
    return f"most successes by {title(best)}, {_percent(means[best])}{same}."


def _parted(results: Results) -> list[str]:
    """Methods whose guide finds their pictures better than those of nothing, while the judge finds them worse."""
    lines, untold = [], []
    for task in results.tasks:
        for method in results.methods(task):
            if method in UNPAID or "none" not in results.methods(task):
                continue
            loss, success, shows = (
                difference(results.values(task, method, column), results.values(task, "none", column))
                for column in ("loss", "success", "shows")
            )
            if loss is None or success is None or shows is None or loss.high >= 0:
                continue
            pairs = (("success", success), ("pictures that show the prompt", shows))
            what = [f"{name} {_points(one)} points" for name, one in pairs if one.high < 0]
            if what:
                lines.append(f"- {task}, {title(method)}: loss {_number(loss)}, but {'; '.join(what)}.")
            elif success.low <= 0:
                untold.append(f"- {task}, {title(method)}: success {_points(success)} points.")
    lines = lines or ["Nowhere that can be told: where the loss is lower, the judge finds nothing worse."]
    if untold:
        lines += ["", "A lower loss than nothing has, and successes that cannot be told apart from its:", "", *untold]
    return lines


def _task(results: Results, task: str, figure: str) -> str:
    lines = [f"## {tasks.TITLES[task]}", "", *_where(results, task)]
    lines += [f"![Success and loss of all methods in this task]({figure})", ""]
    lines += ["| method | success | shows the prompt | guide's loss | diversity | distance from unguided |"]
    lines += ["|---|---|---|---|---|---|"]
    for method in results.methods(task):
        cells = []
        for column, form in zip(
            ("success", "shows", "loss", "diversity", "distance"),
            (_percent, _percent, _number, _number, _number),
            strict=True,
        ):
            values = results.values(task, method, column)
            cells.append(form(interval(values)) if values else "")
        lines.append(f"| {title(method)} | " + " | ".join(cells) + " |")
    if task == "aesthetic":
        lines += ["", "The rule's own value, the contrast from 0 to 1:", "", "| method | value |", "|---|---|"]
        for method in results.methods(task):
            lines.append(f"| {title(method)} | {_number(interval(results.values(task, method, 'score')))} |")
    lines += ["", *_costs(results, task), "", *_equal_seconds(results, task)]
    return "\n".join(lines)


def _where(results: Results, task: str) -> list[str]:
    """Says where a task was run, if not where most of the page was."""
    machines = results.machines(task)
    if machines == [results.about["machine"]]:
        return []
    shown = " and ".join(f"{one['device']} ({_threads(one)}, torch {one['torch']})" for one in machines)
    return [f"The pictures of this task were made on {shown}, so its seconds and peaks are of that machine.", ""]


def _threads(machine: dict[str, Any]) -> str:
    return "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def _costs(results: Results, task: str) -> list[str]:
    lines = ["| method | calls a picture: forward + VJPs | pictures scored | ms a picture | peak, MiB, batch |"]
    lines += ["|---|---|---|---|---|"]
    for method in results.methods(task):
        cost = results.cost(task, method)
        peak = "" if cost["peak"] is None else f"{cost['peak']:.0f}, {cost['batch']:.0f}"
        lines.append(
            f"| {title(method)} | {cost['forward']:g} + {cost['backward']:g} | {cost['evaluations']} | "
            f"{1000 * float(cost['seconds'] or 0):.3g} | {peak} |"
        )
    return lines


def _equal_seconds(results: Results, task: str) -> list[str]:
    if not set(results.methods(task)) - set(UNPAID):
        return []
    limit, found = results.equal_seconds(task)
    lines = [f"At equal seconds, {1000 * limit:.3g} ms a picture (the last checkpoint that each reaches by then):", ""]
    lines += ["| method | success | calls | ms a picture |", "|---|---|---|---|"]
    for method, (calls, seconds, values) in found.items():
        lines.append(f"| {title(method)} | {_percent(interval(values))} | {calls:g} | {1000 * seconds:.3g} |")
    late = [title(m) for m in results.methods(task) if m not in UNPAID and m not in found]
    return [*lines, *(["", f"No checkpoint by then: {'; '.join(late)}."] if late else [])]


def _tuning(results: Results) -> str:
    setting, ends = results.about["setting"], []
    lines = [
        "## Tuning",
        "",
        f"Every method with a scale tried {setting['trials']} of them on {setting['tune_prompts']} other prompts x "
        f"{setting['tune_seeds']} other seeds, at the same budget. The one that the judge found best was taken, by the "
        "mean share of attributes that are right, and by success in the task of an aesthetic score; of equal ones that "
        "with the lowest loss. Best of N has no scale. In brackets: this mean.",
        "",
        "| task | method | scales that were tried | chosen |",
        "|---|---|---|---|",
    ]
    for task in results.tasks:
        for method in results.methods(task):
            tried: list[dict[str, Any]] = results.tuning[task][method]
            if tried:
                chosen = results.rows(task, method)[0]["scale"]
                shown = ", ".join(f"{one['scale']:g} ({one[tasks.TUNED_BY[task]]:.2f})" for one in tried)
                lines.append(f"| {task} | {title(method)} | {shown} | {chosen:g} |")
                if chosen in (tried[0]["scale"], tried[-1]["scale"]):
                    ends.append(f"{task}, {title(method)}")
    if ends:
        lines += ["", f"Chosen at an end of what was tried, so that a better one may lie beyond: {'; '.join(ends)}."]
    return "\n".join(lines)


def _figure(results: Results, task: str, path: Path) -> None:
    """Success and loss of all methods with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = results.methods(task)[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.36 * len(methods) + 1.1), sharey=True, layout="constrained")
    for axis, column, name in zip(axes, ("success", "loss"), ("success, judged", "loss of the guide"), strict=True):
        for place, method in enumerate(methods):
            one = interval(results.values(task, method, column))
            ends = [[max(0.0, one.mean - _bound(one.low, one.mean))], [max(0.0, _bound(one.high, one.mean) - one.mean)]]
            axis.errorbar(one.mean, place, xerr=ends, fmt="o", color="tab:blue", capsize=3)
        axis.set_xlabel(name)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_xlim(-0.03, 1.03)
    axes[0].set_yticks(range(len(methods)), [title(method) for method in methods])
    figure.savefig(path, dpi=80)
    plt.close(figure)
