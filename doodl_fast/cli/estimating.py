"""`doodl-fast estimate`: what a gradient through a model takes in memory, computed without its weights."""

from __future__ import annotations

import argparse

from . import options
from .errors import is_raised_here
from .families import add_guidance_scale, add_own_options, own_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "model",
        type=options.text,
        metavar="MODEL",
        help="a published model (flux1-dev, sd35-large, wan21-14b, ...; an unknown name lists all), or a diffusers "
        "folder, of which only the configs are read",
    )
    parser.add_argument("--steps", type=options.integer(), default=50, help="diffusion steps")
    add_guidance_scale(parser)
    options.add_size(parser)
    add_own_options(parser)
    parser.add_argument(
        "--frames",
        type=options.integer(),
        nargs="+",
        help="numbers of the frames of a video that are decoded for the loss (default: all)",
    )
    options.add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the estimate of a model that is not loaded."""
    if args.steps < 1:
        raise ValueError(f"--steps: expected a number of at least 1, got {args.steps}")
    options.quiet_libraries()
    from .estimate import estimate

    given = {name: getattr(args, name) for name in ("height", "width", "guidance_scale")}
    call = {**{name: value for name, value in given.items() if value is not None}, **own_options(args)}
    try:
        found = estimate(args.model, None, options.find_dtype(args.dtype), args.steps, frames=args.frames, **call)
    except TypeError as error:
        if not is_raised_here(error.__traceback__):
            raise
        raise ValueError(str(error)) from error
    print(f"{args.model}, {args.dtype}, {args.steps} EDICT steps of {found.subject}; estimated on the meta device\n")
    print(found)
    return 0
