"""`python -m doodl_fast.cli` is the command `doodl-fast`."""

from __future__ import annotations

import sys

from .entry import main

if __name__ == "__main__":
    sys.exit(main())
