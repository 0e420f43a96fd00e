"""Writes session.json and session.md of `bench/gpu_session.sh` from what its parts have left so far.

python bench/gpu_summary.py OUT SCRATCH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from streamed import read

KEYS = ("part", "exit", "seconds", "said")


def read_json(path: Path) -> Any:
    """What a JSON file holds, or None if there is none, or half a one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def cell(value: Any) -> str:
    """A value as the cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    return "" if value is None else str(value).replace("|", "/")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as the lines of a table, with a column for every key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows]


def error_line(message: str) -> str:
    """The first line of the error in pytest's message, which begins with E, or else the last line."""
    lines = message.splitlines() or [""]
    return next((line[1:].strip() for line in lines if line.startswith("E  ")), lines[-1])[:300]


def said_of_tests(tests: dict[str, Any]) -> list[str]:
    """The counts of the tests, and the names of those that failed or had not ended, as lines of the page."""
    if not tests["counts"] and not tests["unfinished"]:
        return []
    failed = [
        {"test": row["test"], "outcome": row["outcome"], "error": error_line(row.get("message", ""))}
        for row in tests["failed"]
    ]
    lines = ["## tests", "", cell(tests["counts"]) or "no test has ended", "", *(table(failed) if failed else []), ""]
    return lines + [f"- had not ended: {name}" for name in tests["unfinished"]] + [""]


def main() -> None:
    out, scratch = map(Path, sys.argv[1:])
    parts = [
        dict(zip(KEYS, line.split("\t", 3), strict=False)) for line in (scratch / "parts").read_text().splitlines()
    ]
    doctor = (scratch / "doctor").read_text().splitlines() if (scratch / "doctor").is_file() else []
    rows, ops = read_json(out / "end_to_end.json") or [], read_json(out / "ops.json")
    tests = read(out / "tests.jsonl")
    session = {"parts": parts, "doctor": doctor, "tests": tests, "end_to_end": rows, "ops": ops}
    (out / "session.json").write_text(json.dumps(session, indent=1) + "\n")
    page = ["# GPU session", "", *table(parts), "", "```", *doctor, "```", "", *said_of_tests(tests)]
    for part in dict.fromkeys(row["part"] for row in rows):
        shared = ("part", "on", "torch")
        found = [{key: value for key, value in row.items() if key not in shared} for row in rows if row["part"] == part]
        page += [f"## {part}", "", *table(found), ""]
    if ops is not None and (scratch / "ops.md").is_file():
        page += ["## ops", "", (scratch / "ops.md").read_text()]
    (out / "session.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
