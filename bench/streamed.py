"""A plugin of pytest that writes every result to a file at once, so that a run which is killed loses none of them.

    PYTHONPATH=. python -m pytest -p bench.streamed --streamed=FILE tests/ops

FILE gets a line of JSON for each test that has ended: its name, what became of it, seconds, and the end of the message
if it failed. Tests that were begun and have no such line are those that were running when the run ended; with
pytest-xdist there is one for each worker. `bench/gpu_summary.py` reads the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

MESSAGE = 2000
"""The number of characters that are kept of the end of a message."""


class Streamed:
    """Appends results to a file, and closes it after each, so that nothing waits in a buffer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write(self, **values: Any) -> None:
        """Appends one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes a test's call, and its setup or teardown if they decide what becomes of it."""
        if report.when != "call" and report.passed:
            return
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        message = {"message": report.longreprtext[-MESSAGE:]} if report.failed else {}
        self.write(test=report.nodeid, outcome=outcome, seconds=round(report.duration, 3), **message)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="error", message=report.longreprtext[-MESSAGE:])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--streamed", metavar="FILE", help="append the result of each test to this file as it ends")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin in the process that collects the results, and in no worker of pytest-xdist."""
    file = config.getoption("streamed")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Streamed(Path(file).resolve()), "streamed-results")


def read(path: Path) -> dict[str, Any]:
    """Returns what such a file says: counts by outcome, the tests that failed, and those that had not ended.

    Args:
        path: The file, of which the last line may be cut off. A file that is not there counts as an empty one.

    Returns:
        `counts` by outcome, `failed` with one dict of `test`, `outcome`, `seconds` and `message` for each, and
        `unfinished` with names.
    """
    begun: dict[str, None] = {}
    ended: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that was being written
        if row["outcome"] == "begun":
            begun[row["test"]] = None
        elif ended.get(row["test"], {}).get("outcome") not in ("failed", "error"):
            ended[row["test"]] = row
    counts: dict[str, int] = {}
    for row in ended.values():
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    failed = [row for row in ended.values() if row["outcome"] in ("failed", "error")]
    return {"counts": counts, "failed": failed, "unfinished": [test for test in begun if test not in ended]}
