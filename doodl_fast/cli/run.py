"""`doodl-fast run`: optimises the latents of a diffusers pipeline for a guide; stores pictures, losses and state."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options
from .checks import check_sizes
from .families import (
    add_guidance_scale,
    add_own_options,
    add_prompt,
    check_prompt,
    fill_guidance_scale,
    frames_decoder,
    own_options,
)
from .files import replace, write_animation, write_json, write_picture
from .guides import add_arguments as add_guide_arguments
from .guides import check_guide, guides
from .losses import find_optimizer, guide_names, make_losses
from .solvers import EDICT, add_solver, check_solver, make_chain

if TYPE_CHECKING:
    from torch import Tensor

    from ..optimization.loop import Result, StepInfo
    from ..solvers.base import DiffusionChain

SETTINGS, RESULT, STATE = "run.json", "result.json", "state"
OUTPUTS = ("before.png", "after.png", "best.png", "after.webp", "best.webp", "losses.png", SETTINGS, RESULT, STATE)
MAY_CHANGE = ("optimization_steps", "out", "resume", "save_every", "memory", "memory_budget", "device")
"""The options with which a run may be continued differently from how it began."""

OLD_RUNS: dict[str, Any] = {
    "solver": EDICT,
    "gamma": None,
    "scheme": None,
    "zeta": None,
    "num_frames": None,
    "option": [],
    "loss": None,
    "target": None,
    "optimizer": None,
    "lr": None,
    "arithmetic": "float",
}
"""Options of runs that were stored before there were these."""
OLD_DEFAULTS = {"guidance_scale": 7.5, "negative_prompt": ""}
"""What such runs stored for options that were not given, and that are None since each family has its own default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    model = parser.add_argument_group("model and picture")
    options.add_model(model)
    add_prompt(model, "what the picture shows; required where the model takes a prompt")
    model.add_argument("--steps", type=options.integer(), default=50, help="diffusion steps")
    add_guidance_scale(model)
    add_solver(model)
    options.add_size(model)
    add_own_options(model)
    model.add_argument("--seed", type=options.integer(options.SEEDS), default=0)
    options.add_device(model)
    options.add_dtype(model)
    add_guide_arguments(parser.add_argument_group("guidance"))
    update = parser.add_argument_group("optimisation")
    update.add_argument("--optimization-steps", type=options.integer(), default=50)
    update.add_argument(
        "--grad-scale",
        "--learning-rate",
        dest="learning_rate",
        type=options.number,
        default=1.0,
        help="multiplies the gradient before it is clipped",
    )
    update.add_argument("--momentum", type=options.number, default=0.9)
    update.add_argument("--nesterov", action="store_true")
    update.add_argument("--clip-grad-value", type=_float_or_none, default=1e-3, help="or none")
    update.add_argument("--perturbation-scale", type=options.number, default=1e-4)
    update.add_argument("--no-tied", dest="tied", action="store_false", help="let the two latents part")
    update.add_argument("--no-renormalize", dest="renormalize", action="store_false")
    update.add_argument("--first-image-only", action="store_true", help="decode and score one of the two pictures")
    update.add_argument("--optimizer", type=options.text, help="of torch.optim, e.g. Adam (default: momentum SGD)")
    update.add_argument("--lr", type=options.number, help="learning rate of --optimizer (default: its own)")
    update.add_argument(
        "--arithmetic",
        choices=("float", "exact", "exact64"),
        default="float",
        help="exact undoes every step to the bit, see docs/exact.md",
    )
    update.add_argument("--memory", type=_memory, default="checkpoint", help="checkpoint, reversible, auto, naive or k")
    update.add_argument("--memory-budget", help="for --memory auto, e.g. 6GiB (default: what is free)")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=options.folder, required=True, help="folder for pictures, losses and state")
    files.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    files.add_argument(
        "--save-every", type=options.integer(), default=1, metavar="N", help="optimisation steps between pictures"
    )


def _float_or_none(text: str) -> float | None:
    """A number, or None for the word none."""
    return None if text.lower() == "none" else options.number(text)


def _memory(text: str) -> str | int:
    """The name of a memory strategy, or k."""
    return options.integer()(text) if text.isdecimal() else text


def run(args: argparse.Namespace) -> int:
    """Runs the optimisation and writes its results; gives the exit code."""
    check_and_fill(args)
    settings = options.as_json(args)
    continued = _check_out(args, settings)
    check_model_options(args)
    import torch

    from ..optimization.loop import optimize

    device, dtype = options.find_device(args.device), options.find_dtype(args.dtype)
    loss = make_losses(args, guides(), device, dtype)  # before the larger model, so that its mistakes show early
    pipeline = options.load_pipeline(args)
    chain = make_chain(args, pipeline, memory=args.memory, memory_budget=args.memory_budget, arithmetic=args.arithmetic)
    latents = draw_noise(chain, args.seed)
    decode, frames = frames_decoder(chain)
    began = time.perf_counter()
    # the losses' random cutouts come from the global generator
    torch.manual_seed(args.seed)
    result = optimize(
        chain,
        latents,
        decode,
        loss,
        args.optimization_steps,
        **update_options(args),
        callback_on_step_end=_Writer(args.out, settings, args.save_every, frames),
        folder=args.out / STATE,
        resume=continued,
    )
    _write_result(args.out, settings, result, time.perf_counter() - began, frames)
    print(
        f"loss {result.losses[0]:.5g} -> {result.final_loss:.5g}, best {result.best_loss:.5g} after "
        f"{result.best_step} steps; pictures and {RESULT} in {args.out}"
    )
    return 0


def check_and_fill(args: argparse.Namespace) -> None:
    """Checks the options of the guide and the solver, and fills in the defaults that depend on other options."""
    check_guide(args)
    check_solver(args)
    fill_guidance_scale(args)


def check_model_options(args: argparse.Namespace) -> None:
    """Checks everything else that can be said before a model is loaded."""
    options.quiet_libraries()
    options.find_device(args.device)
    _check_numbers(args)
    options.check_model(args.model)
    check_prompt(args)
    own_options(args)
    check_sizes(args, [args.steps], ("height", "width"))
    find_optimizer(args.optimizer, args.lr)


def update_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `optimize` that the command line gives."""
    return {
        "grad_scale": args.learning_rate,
        "momentum": args.momentum,
        "nesterov": args.nesterov,
        "clip_grad_value": args.clip_grad_value,
        "tied_latents": args.tied,
        "renormalize_latents": args.renormalize,
        "perturbation_scale": args.perturbation_scale,
        "first_image_only": args.first_image_only,
        "optimizer": find_optimizer(args.optimizer, args.lr),
        "seed": args.seed,
    }


def draw_noise(chain: DiffusionChain, seed: int) -> Tensor:
    """Draws the starting latents and, for a sampler that adds noise in its steps, that noise as well.

    Both are drawn from one generator, as diffusers' pipelines do, so that no noise is drawn twice.
    """
    import torch

    from ..solvers.sampler import Sampler

    generator = torch.Generator().manual_seed(seed)
    latents = chain.noise(generator=generator)
    if isinstance(chain, Sampler):
        chain.step_noise = chain.draw_noise(latents, generator=generator)
    return latents


def _check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError for an optimisation that cannot begin, before any model is loaded."""
    from ..chain.memory.plan import parse_bytes
    from ..chain.memory.strategies import strategy_of
    from ..optimization.arguments import check_steps
    from ..optimization.update import UpdateSettings

    check_steps(args.optimization_steps)
    UpdateSettings(
        grad_scale=args.learning_rate,
        momentum=args.momentum,
        nesterov=args.nesterov,
        clip_grad_value=args.clip_grad_value,
        perturbation_scale=args.perturbation_scale,
    )
    strategy_of(args.memory)
    if args.memory_budget is not None:
        parse_bytes(args.memory_budget)
        if args.memory != "auto":
            raise ValueError(f"--memory-budget: expected --memory auto with it, got --memory {args.memory}")


def _check_out(args: argparse.Namespace, settings: dict[str, Any]) -> bool:
    """Whether a stored state is continued. Raises ValueError when the folder is taken; writes nothing."""
    out: Path = args.out
    if args.save_every < 1:
        raise ValueError(f"--save-every: expected at least 1, got {args.save_every}")
    options.check_folder(out)
    taken = [name for name in OUTPUTS if (out / name).exists()] + [p.name for p in out.glob("step_*.png")]
    if not taken:
        return False
    if not args.resume:
        raise ValueError(
            f"--out: {str(out)!r} already holds a run ({taken[0]}); pass --resume to continue it, or another folder"
        )
    if not (out / SETTINGS).is_file():
        raise ValueError(f"--resume: expected {SETTINGS} in {str(out)!r}, got none; start in another folder")
    try:
        stored = json.loads((out / SETTINGS).read_text())
        if not isinstance(stored, dict):
            raise ValueError(f"it holds a {type(stored).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--resume: {str(out / SETTINGS)!r} is damaged ({error}); start in another folder") from error
    stored = {**OLD_RUNS, **stored}
    for key, value in settings.items():
        is_old_default = value is None and key in OLD_DEFAULTS and stored.get(key) == OLD_DEFAULTS[key]
        if key not in MAY_CHANGE and stored.get(key) != value and not is_old_default:
            raise ValueError(
                f"--resume: the run in {str(out)!r} had --{key.replace('_', '-')} {stored.get(key)!r}, got {value!r}; "
                "pass what it was started with, or another --out"
            )
    if (out / STATE / "state.json").exists():
        return True
    # A run that was killed in its first step has no state yet, and begins anew.
    later = [name for name in taken if name not in (SETTINGS, STATE, "before.png", "step_000.png")]
    if later and any((out / STATE).glob("state-*")):
        return True  # Loading the state says that its index is missing.
    if later:
        raise ValueError(
            f"--resume: {str(out)!r} holds {later[0]} and no {STATE}/state.json, without which the run cannot be "
            "continued; start in another folder"
        )
    return False


@dataclass(frozen=True)
class _Writer:
    """The callback that stores the settings and pictures as the run goes; its first call creates the folder."""

    out: Path
    settings: dict[str, Any]
    every: int
    frames: int | None = None

    def __call__(self, info: StepInfo) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / SETTINGS, self.settings)
        if info.step == 0:
            write_picture(self.out / "before.png", info.images[0], self.frames)
        if info.step % self.every == 0:
            write_picture(self.out / f"step_{info.step:03d}.png", info.images[0], self.frames)


def _write_result(
    out: Path, settings: dict[str, Any], result: Result, seconds: float, frames: int | None = None
) -> None:
    """Writes the last and the best picture or video, the curve of the losses, and a JSON file of the numbers."""
    import torch

    from .. import __version__

    for name, images in (("after", result.images[0]), ("best", result.best_images[0])):
        write_picture(out / f"{name}.png", images, frames)
        if frames is not None:
            write_animation(out / f"{name}.webp", images[:frames])
    _plot(
        out / "losses.png",
        [*result.losses, result.final_loss],
        ", ".join([*guide_names(argparse.Namespace(**settings)), *(settings["loss"] or [])]),
    )
    summary = {
        "losses": result.losses,
        "pair_losses": result.pair_losses,
        "history": result.history,
        "final_loss": result.final_loss,
        "best_loss": result.best_loss,
        "best_step": result.best_step,
        "seconds": round(seconds, 3),
        "versions": {"doodl_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "options": settings,
    }
    write_json(out / RESULT, summary)


def _plot(path: Path, losses: Sequence[float], name: str) -> None:
    """Draws the loss against the number of optimisation steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(len(losses)), losses, marker="." if len(losses) < 60 else "")
    axes.set(xlabel="optimisation steps done", ylabel=f"loss ({name})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    replace(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
