"""The command line of this package: `python -m doodl_fast.compat doctor FILE_OR_FOLDER`."""

from __future__ import annotations

import argparse

from . import doctor


def main() -> int:
    """Runs the command that the command line names, and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m doodl_fast.compat", description="Help with DOODL code that exists already."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("doctor", help="read code and say what to change in it, line by line")
    command.add_argument("target", metavar="FILE_OR_FOLDER")
    return doctor.main(parser.parse_args().target)


if __name__ == "__main__":
    raise SystemExit(main())
