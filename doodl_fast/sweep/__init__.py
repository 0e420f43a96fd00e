"""Sweeps: many runs of prompts, seeds, guides, methods and settings in one folder, by any number of processes.

`config.py` reads what is swept, `plan.py` names the runs, `claims.py` decides which process does which run, and
`worker.py` does them. `table.py`, `gallery.py`, `sheet.py` and `summary.py` show what came of them. How a single run is
done is not known here: `doodl-fast sweep` hands a function for it to `work`.
"""

from __future__ import annotations

from .config import expand, read_config
from .plan import Plan, Run
from .summary import Interval, bootstrap_mean, paired_differences
from .table import read_rows
from .worker import work

__all__ = [
    "Interval",
    "Plan",
    "Run",
    "bootstrap_mean",
    "expand",
    "paired_differences",
    "read_config",
    "read_rows",
    "work",
]
