"""The options of a sweep's configuration, read as `doodl-fast run` reads those of its command line."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NoReturn

from ..sweep.plan import Run
from . import run as run_command

KINDS = ("optimize", "none", "best-of", "one-step")
OF_KINDS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "best_of": ("best-of",),
    "one_step_scale": ("one-step",),
    "variables": ("optimize",),
    "patience": ("optimize",),
}
"""The options that a sweep has beside those of `doodl-fast run`, and the kinds of methods that they belong to."""
ELSEWHERE = {
    "prompt": "under prompts",
    "seed": "under seeds",
    "device": "on the command line, as --device",
    "out": "on the command line, as --out",
    "resume": "nowhere, as a sweep always goes on",
    "save_every": "nowhere, as a sweep stores the first, the last and the best picture",
}


class _Parser(argparse.ArgumentParser):
    """A parser that raises ValueError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@cache
def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.Action]]:
    """The parser of `doodl-fast run`, and its options by every name that they have."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    run_command.add_arguments(parser)
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        for flag in action.option_strings:
            actions[flag.removeprefix("--").replace("-", "_")] = action
    for action in parser._actions:
        actions.setdefault(action.dest, action)
    return parser, actions


def namespace(run: Run, device: str | None = None) -> argparse.Namespace:
    """The options of `doodl-fast run`, and those of the sweep's own, for one run.

    Args:
        run: The run.
        device: What --device is.

    Raises:
        ValueError: An option is unknown, belongs elsewhere, or has a value that it cannot have.
    """
    where = ", ".join(
        f"{kind} {name!r}" for kind, name in (("method", run.method), ("guide", run.guide), ("setting", run.setting))
    )
    try:
        args = copy.copy(_parsed(run.options))
    except ValueError as error:
        raise ValueError(f"CONFIG: {where}: {error}") from error
    args.prompt, args.seed, args.device = run.prompt, run.seed, device
    return args


def _parsed(options: Mapping[str, Any]) -> argparse.Namespace:
    """The options as the parser of `doodl-fast run` reads them."""
    parser, actions = _parser()
    words = ["--out=sweep"]
    own = {name: options[name] for name in OF_KINDS if name in options}
    for name, value in options.items():
        if name in OF_KINDS:
            continue
        if name in ELSEWHERE:
            raise ValueError(f"{name!r} belongs {ELSEWHERE[name]}")
        if name not in actions:
            raise ValueError(f"expected an option of `doodl-fast run` or one of {', '.join(OF_KINDS)}, got {name!r}")
        words += _words(name, actions[name], value)
    args = parser.parse_args(words)
    args.guidance = copy.copy(args.guidance)
    for name, value in _own_options(own).items():
        setattr(args, name, value)
    return args


def _words(name: str, action: argparse.Action, value: Any) -> list[str]:
    """An option as a command line has it."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        # An option such as --no-tied sets the destination tied to false.
        is_given = value != action.default if name == action.dest else value
        return [flag] if is_given else []
    if value is None:
        return [f"{flag}=none"] if name == "clip_grad_value" else []
    if isinstance(value, (Mapping, bool)):
        raise ValueError(f"{name}: expected a number, a text or a list, got {value!r}")
    if not isinstance(value, list):
        return [f"{flag}={value}"] if action.nargs is None else [flag, str(value)]
    if not value:
        raise ValueError(f"{name}: expected a value, got an empty list")
    if action.nargs is not None:
        return [flag, *map(str, value)]
    if isinstance(action.default, list):
        return [f"{flag}={entry}" for entry in value]
    raise ValueError(f"{name}: expected one value, got the list {value!r}")


def _own_options(own: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep's own options, checked and with their defaults."""
    kind = own.get("kind", "optimize")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    for name in own:
        if kind not in OF_KINDS[name]:
            raise ValueError(f"{name}: expected kind {' or '.join(OF_KINDS[name])} with it, got {kind}; omit it")
    best_of, scale = own.get("best_of"), own.get("one_step_scale", 1.0)
    variables, patience = own.get("variables"), own.get("patience")
    if kind == "best-of" and (type(best_of) is not int or best_of < 1):
        raise ValueError(f"best_of: expected a whole number of at least 1, got {best_of!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"one_step_scale: expected a finite number, got {scale!r}")
    if variables is not None and (not isinstance(variables, list) or not all(isinstance(v, str) for v in variables)):
        raise ValueError(f"variables: expected a list of names, as in ['start', 'noise'], got {variables!r}")
    if patience is not None and (type(patience) is not int or patience < 1):
        raise ValueError(f"patience: expected a whole number of at least 1, got {patience!r}")
    given = (kind, best_of, float(scale), variables, patience)
    return dict(zip(OF_KINDS, given, strict=True))


def different(runs: Iterable[Run]) -> list[Run]:
    """One run for each combination of options, without regard to the seed, and to the prompt beyond the first."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(repr(sorted(run.options.items())), run)
    return list(found.values())


def check(runs: Iterable[Run], device: str | None) -> None:
    """Checks the options of all runs before anything is loaded or written.

    Raises:
        ValueError: One cannot work.
    """
    for run in different(runs):
        args = namespace(run, device)
        try:
            run_command.check_and_fill(args)
            run_command.check_model_options(args)
            if args.kind == "one-step" and args.solver in ("sampler", "dpm-solver", "unipc", "lcm"):
                raise ValueError(f"solver: expected one whose steps are a schedule's with one-step, got {args.solver}")
        except ValueError as error:
            raise ValueError(f"CONFIG: method {run.method!r}, guide {run.guide!r}: {error}") from error
