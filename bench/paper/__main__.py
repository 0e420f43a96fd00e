"""Runs the command line. It is in a module of its own, as processes that are started here import it by its name."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
