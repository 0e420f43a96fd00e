"""What a sweep's folder shows of its runs: the table, the gallery and the contact sheet."""

from __future__ import annotations

from pathlib import Path

from .files import remove_partial
from .gallery import write_gallery
from .plan import Plan
from .sheet import write_sheet
from .table import PENDING, Row, csv_bytes, read_rows, write_csv, write_parquet, write_timings

TABLE, PARQUET, TIMINGS, GALLERY, SHEET = (
    "results.csv",
    "results.parquet",
    "timings.csv",
    "gallery.html",
    "contact_sheet.png",
)
LONG_AGO = 3600.0
"""After how many seconds a file that is still being written counts as left behind."""


def write_report(folder: Path, plan: Plan | None = None, only_if_changed: bool = False) -> list[Row]:
    """Writes the table, the gallery and the contact sheet of a sweep.

    Several processes may do so at once. Each writes again when more runs are done after it has written than it knew of,
    so that the files of the last one have them all.

    Args:
        folder: Of the sweep.
        plan: What it consists of; None reads it from the folder.
        only_if_changed: Whether nothing is written where the table that is there is this one.

    Returns:
        The rows of the table.
    """
    plan = plan or Plan.load(folder)
    rows = read_rows(folder, plan)
    is_there = (folder / GALLERY).exists() and (folder / TABLE).exists()
    if only_if_changed and is_there and (folder / TABLE).read_bytes() == csv_bytes(rows):
        return rows
    remove_partial(folder, LONG_AGO)
    while True:
        write_csv(folder / TABLE, rows)
        write_parquet(folder / PARQUET, rows)
        write_timings(folder / TIMINGS, rows)
        write_sheet(folder / SHEET, folder, rows)
        write_gallery(folder / GALLERY, folder, rows)
        now = read_rows(folder, plan)
        if _ended(now) == _ended(rows):
            return rows
        rows = now


def _ended(rows: list[Row]) -> int:
    """How many runs have ended."""
    return sum(row["status"] != PENDING for row in rows)
