"""The entry point of `doodl-fast`: parses the command line, runs the command, and gives the exit code.

This module cannot be called `main`, because `doodl_fast.cli.main` is the function. It imports the commands' modules,
which import torch and the models' libraries only when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from .errors import UsageError, explain

COMMANDS = {
    "demo": "optimise latents of the embedded pipeline and show what changes",
    "run": "optimise latents of a diffusers pipeline for a guide",
    "sweep": "do runs of many prompts, seeds, guides and methods, in any number of processes",
    "summarise": "compare the methods of a sweep, with intervals",
    "invert": "take a picture to the noise that leads to it, exactly",
    "generate": "make an inverted picture again, or edit it by another prompt",
    "drift": "measure how exactly chains come back, by arithmetic and length",
    "profile": "measure or estimate what gradients take in memory and time",
    "estimate": "estimate what gradients through a model take in memory, without its weights",
    "doctor": "say which kernel backends there are, and why others are missing",
}
"""The help line of every command, by the name of its module in this package, but for those in `MODULES`."""
MODULES = {"estimate": "estimating"}
"""The modules of commands that are not called as their command is."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the defaults, but not None, and not where the help says what the default is."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, True) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: The arguments behind `doodl-fast`; None takes those of the process.

    Returns:
        The exit code: 0 for success; 2 for a mistake of the user, with one line on stderr; 1 for a bug, with its
        traceback; 130 after Ctrl-C. A command may give others. With --debug a mistake shows its traceback too.
    """
    args = None
    debug = False
    try:
        _check_encoding(sys.argv[1:] if argv is None else argv)
        args = _parser().parse_args(argv)
        debug = vars(args).pop("debug")
        return int(_module(args.command).run(args) or 0)
    except KeyboardInterrupt:
        hint = "; the same command with --resume continues" if hasattr(args, "resume") else ""
        hint = "; the same command continues" if getattr(args, "command", None) == "sweep" else hint
        print(f"\ndoodl-fast: interrupted{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        line = explain(error, args)
        if debug or line is None:
            traceback.print_exc()
        if line is None:
            print("doodl-fast: this is a bug; please report it with the traceback above", file=sys.stderr)
            return 1
        print(f"doodl-fast: error: {line}", file=sys.stderr)
        return 2


def _check_encoding(arguments: Sequence[str]) -> None:
    """Raises UsageError for an argument that is not UTF-8: it can be neither printed nor stored beside the results."""
    for argument in arguments:
        if not argument.isascii() and any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise UsageError(f"expected arguments in UTF-8, got {argument!a}")


def _module(command: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f".{MODULES.get(command, command)}", __package__)


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="doodl-fast", description="Optimises a diffusion model's latents for a loss on its pictures.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=line,
            description=line,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        _module(name).add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of a mistake too")
    return parser
