"""The command line: `doodl-fast COMMAND`. One file for each command."""

from __future__ import annotations

from .entry import main

__all__ = ["main"]
