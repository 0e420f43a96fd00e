"""The command line: `doodl-fast COMMAND`. Each command is one file, with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

from .entry import main

__all__ = ["main"]
