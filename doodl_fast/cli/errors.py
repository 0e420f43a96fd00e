"""Tells mistakes of the user, which end in one line, from bugs, which show their traceback."""

from __future__ import annotations

import argparse
import dis
from types import TracebackType
from typing import Any

PACKAGE = __name__.partition(".")[0]
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "STATUS_ALLOC_FAILED",
    "Storage size calculation overflowed",
)
"""What PyTorch's allocators and the libraries that it calls say in a plain RuntimeError."""
SIZES = ("height", "width", "resolution", "batch", "num_cutouts", "steps", "memory", "memory_budget", "dtype", "device")
"""The options that decide how much memory a command takes, as an error lists them."""
REFUSALS = (ValueError, FloatingPointError, OverflowError)
"""The types of error by which this package refuses what it is given."""


class UsageError(Exception):
    """A command line that cannot be parsed."""


def explain(error: Exception, args: argparse.Namespace | None) -> str | None:
    """Describes a mistake of the user in one line.

    These are mistakes of the user: a command line that cannot be parsed, files and folders that cannot be used
    (OSError), a missing kernel backend, too little memory, and what the code of this package refuses. The last is a
    ValueError, FloatingPointError or OverflowError that a `raise` statement of this package raised. An error of these
    types that Python or another library raised is a bug of this package, and so is any other error.

    Args:
        error: The error.
        args: The parsed command line, if it could be parsed.

    Returns:
        The line, or None for a bug.
    """
    line = " ".join(str(error).split())
    if is_out_of_memory(error):
        given = vars(args) if args is not None else {}
        asked = [_as_typed(name, given[name]) for name in SIZES if given.get(name) is not None]
        reason = f" ({line[:200]})" if line else ""
        return f"out of memory with {', '.join(asked) or 'the default sizes'}; ask for less{reason}"
    if isinstance(error, (UsageError, OSError)) or type(error).__name__ == "BackendUnavailable":
        return line or type(error).__name__
    if isinstance(error, REFUSALS) and is_raised_here(error.__traceback__):
        return line
    return None


def _as_typed(name: str, value: Any) -> str:
    """An option with its value, as a command line has it."""
    return f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def is_raised_here(traceback: TracebackType | None) -> bool:
    """Whether a `raise` statement of this package raised an error: the innermost frame stands at one."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    module = str(frame.f_globals.get("__name__", ""))
    if module != PACKAGE and not module.startswith(PACKAGE + "."):
        return False
    return frame.f_code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
