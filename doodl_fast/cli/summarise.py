"""`doodl-fast summarise`: means, 95% bootstrap intervals and paired differences by method of a sweep."""

from __future__ import annotations

import argparse

from . import options
from .files import write_json

SUMMARY = "summary.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("folder", type=options.folder, metavar="FOLDER", help="that of a sweep, finished or not")
    parser.add_argument("--baseline", type=options.text, help="method that others are compared with (default: first)")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        help="numbers of the table (default: last loss, measures, distance, seconds)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the table, the gallery and the summary of a sweep, and prints the summary; gives the exit code."""
    from ..sweep.files import finite
    from ..sweep.report import write_report
    from ..sweep.summary import as_text, summarise
    from ..sweep.table import DONE

    rows = write_report(args.folder, only_if_changed=True)
    found = summarise(rows, args.baseline, args.columns)
    baseline = args.baseline or rows[0]["method"]
    done = sum(row["status"] == DONE for row in rows)
    print(f"{done} of {len(rows)} runs are done\n\n{as_text(found, baseline)}")
    print(
        "Intervals are percentile bootstraps of 9999 draws; whole prompts are drawn where there are several, and runs "
        "otherwise. With fewer than about 10 that are drawn they are too narrow. "
        f"{SUMMARY} in {args.folder} has the numbers."
    )
    write_json(args.folder / SUMMARY, finite({"baseline": baseline, "runs": done, "summary": found}))
    return 0
