"""The solvers that a command line may name: their options, the checks of those, and the chains that they make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import is_raised_here
from .families import own_options
from .options import Parser, number

if TYPE_CHECKING:
    from ..solvers.base import DiffusionChain

EDICT = "edict"
DEFAULTS: dict[str, float | str] = {"mix_weight": 0.93, "gamma": 1.0, "scheme": "midpoint", "zeta": 0.999}
"""What a solver's option is when it is not given. The parser does not know these, so that a given one can be told."""
SCHEMES = ("euler", "midpoint", "heun", "rk4")
"""Those of `Rex`, which the parser must know before torch is loaded."""


@dataclass(frozen=True)
class Solver:
    """What the command line knows of a solver.

    Attributes:
        invertible: Whether `invert` and `generate` may use it.
        has_two_latents: Whether it starts from two latents and makes two pictures, as EDICT does.
        options: The arguments of its class that have an option of their own.
    """

    invertible: bool = False
    has_two_latents: bool = False
    options: tuple[str, ...] = ()


SOLVERS = {
    EDICT: Solver(invertible=True, has_two_latents=True, options=("mix_weight",)),
    "ddim": Solver(),
    "bdia": Solver(invertible=True, options=("gamma",)),
    "obelm": Solver(invertible=True),
    "rex": Solver(invertible=True, options=("scheme", "zeta")),
    "sampler": Solver(),
    "dpm-solver": Solver(),
    "unipc": Solver(),
    "lcm": Solver(),
}
INVERTIBLE = tuple(name for name, solver in SOLVERS.items() if solver.invertible)


def add_solver(parser: Parser, names: Sequence[str] = tuple(SOLVERS)) -> None:
    """Adds --solver and the options that belong to one solver each."""
    parser.add_argument(
        "--solver",
        choices=tuple(names),
        default=EDICT,
        help="how the steps are made" + ("; sampler is the pipeline's own scheduler" if "sampler" in names else ""),
    )
    parser.add_argument(
        "--mix-weight", type=number, help=f"for edict: p of its mixing (default: {DEFAULTS['mix_weight']})"
    )
    parser.add_argument(
        "--gamma",
        type=number,
        help=f"for bdia: in (0, 1]; lower is more stable and less accurate (default: {DEFAULTS['gamma']})",
    )
    parser.add_argument(
        "--scheme", choices=SCHEMES, help=f"for rex: its Runge-Kutta scheme (default: {DEFAULTS['scheme']})"
    )
    parser.add_argument(
        "--zeta", type=number, help=f"for rex: in (0, 1]; lower is more stable (default: {DEFAULTS['zeta']})"
    )


def check_solver(args: argparse.Namespace) -> None:
    """Checks the options of the solver before anything is loaded, and fills in their defaults.

    Args:
        args: The command line: solver and the options in `DEFAULTS`; of `run` also tied, first_image_only and memory.

    Raises:
        ValueError: An option belongs to another solver, or is out of range.
    """
    solver = SOLVERS[args.solver]
    for name, default in DEFAULTS.items():
        value = getattr(args, name)
        if name not in solver.options and value is not None:
            owner = next(other for other, kind in SOLVERS.items() if name in kind.options)
            raise _misplaced(name, owner, args.solver)
        if name in solver.options:
            value = default if value is None else value
            if not isinstance(value, str):
                check_share(name, value)
            setattr(args, name, value)
    if solver.has_two_latents:
        return
    for name, is_given in (
        ("no_tied", not getattr(args, "tied", True)),
        ("first_image_only", getattr(args, "first_image_only", False)),
    ):
        if is_given:
            raise _misplaced(name, EDICT, args.solver)
    if not solver.invertible and hasattr(args, "memory"):
        from ..chain.memory.strategies import strategy_of

        if strategy_of(args.memory).needs_invertible:
            raise ValueError(
                f"--memory: expected checkpoint, naive or auto with --solver {args.solver}, whose steps cannot be "
                f"undone, got {args.memory}"
            )


def _misplaced(name: str, owner: str, solver: str) -> ValueError:
    """The error for an option of another solver."""
    flag = name.replace("_", "-")
    return ValueError(f"--{flag}: expected --solver {owner} with it, got --solver {solver}; omit it")


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless an option is a number in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {value}")


def make_chain(args: argparse.Namespace, pipeline: Any, **options: Any) -> DiffusionChain:
    """Makes the chain that a command's options describe.

    Args:
        args: The command line: solver and its options, prompt, negative_prompt, guidance_scale, steps, height, width,
            num_frames, option.
        pipeline: The diffusers pipeline, loaded.
        options: Further arguments of the solver's class: memory, memory_budget, arithmetic.

    Raises:
        ValueError: The pipeline or the solver does not take an option.
    """
    try:
        chain: DiffusionChain = solver_class(args.solver).from_pipeline(
            pipeline,
            args.prompt,
            args.negative_prompt,
            args.steps,
            "auto" if args.guidance_scale is None else args.guidance_scale,
            height=args.height,
            width=args.width,
            **own_options(args),
            **solver_options(args),
            **options,
        )
    except TypeError as error:
        if not is_raised_here(error.__traceback__):
            raise
        raise ValueError(str(error)) from error
    return chain


def make_edict(args: argparse.Namespace, pipeline: Any, steps: int) -> DiffusionChain:
    """Makes the chain of a command that knows EDICT alone.

    Args:
        args: The command line: prompt, negative_prompt, guidance_scale, mix_weight, height, width, num_frames, option.
        pipeline: The diffusers pipeline, loaded.
        steps: The number of diffusion steps.
    """
    return make_chain(argparse.Namespace(**{**vars(args), "solver": EDICT, "steps": steps}), pipeline)


def solver_class(name: str) -> Any:
    """The class of a solver."""
    from ..solvers.bdia import BDIA
    from ..solvers.ddim import DDIM
    from ..solvers.edict import EDICT as Edict
    from ..solvers.obelm import OBELM
    from ..solvers.rex import Rex
    from ..solvers.sampler import LCM, DPMSolver, Sampler, UniPC

    classes = (Edict, DDIM, BDIA, OBELM, Rex, Sampler, DPMSolver, UniPC, LCM)
    return dict(zip(SOLVERS, classes, strict=True))[name]


def solver_options(args: argparse.Namespace) -> dict[str, float | str]:
    """The arguments of the solver's class that the command line gives."""
    return {name: getattr(args, name) for name in SOLVERS[args.solver].options}
