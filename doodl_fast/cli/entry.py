"""The command `doodl-fast`: one subcommand an entry of COMMANDS. torch and the models are imported when one runs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .files import replace, write_json, write_picture
from .guides import DEFAULT_CLIP, EMBEDDED, GUIDES

if TYPE_CHECKING:
    import torch

    from ..optimization.loop import Result, StepInfo

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
SETTINGS, RESULT, STATE = "run.json", "result.json", "state"
OUTPUTS = ("before.png", "after.png", "best.png", "losses.png", SETTINGS, RESULT, STATE)
MAY_CHANGE = ("optimization_steps", "out", "resume", "save_every", "memory", "memory_budget", "device")
"""options with which a run may be continued differently from how it began"""


class UsageError(ValueError):
    """A command line that cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


@dataclass(frozen=True)
class Command:
    """A subcommand: one line of help, what declares its arguments, what runs it (and gives an exit code)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and gives its exit code: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C."""
    parser = _parser()
    resumable = False
    try:
        args = parser.parse_args(argv)
        resumable = hasattr(args, "resume")
        return COMMANDS[args.command].run(args) or 0
    except KeyboardInterrupt:
        hint = "; the same command with --resume continues" if resumable else ""
        print(f"\ndoodl-fast: interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"doodl-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="doodl-fast", description="Optimises a diffusion model's latents for a loss on its pictures.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(sub)
    return parser


def _quiet_libraries() -> None:
    """Their advice and their bars for every file would bury what we print."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()


# demo


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=None, help="diffusion steps (default: the demo's own)")
    parser.add_argument("--optimization-steps", type=int, default=None, help="(default: the demo's own)")


def _demo(args: argparse.Namespace) -> int | None:
    _quiet_libraries()
    from . import demo

    code: int | None = demo.main(args)
    return code


# doctor


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main(args)


# drift


def _drift_arguments(parser: argparse.ArgumentParser) -> None:
    from . import drift

    drift.add_arguments(parser)


def _drift(args: argparse.Namespace) -> int:
    from . import drift

    return drift.main(args, _loaded(args))


# invert, generate


def _invert_arguments(parser: argparse.ArgumentParser) -> None:
    from . import edit as editing

    editing.add_invert_arguments(parser)


def _invert(args: argparse.Namespace) -> int:
    from . import edit as editing

    return editing.invert(args, _loaded)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    from . import edit as editing

    editing.add_generate_arguments(parser)


def _generate(args: argparse.Namespace) -> int:
    from . import edit as editing

    return editing.generate(args, _loaded)


# profile


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    from . import profile as profile_command

    profile_command.add_arguments(parser)


def _profile(args: argparse.Namespace) -> int:
    _quiet_libraries()
    from . import profile as profile_command

    return profile_command.main(args, lambda: _loaded(args))


# run


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and picture")
    model.add_argument("--model", required=True, help=f"diffusers folder, hub id, or {EMBEDDED!r} for the embedded one")
    model.add_argument("--variant", help="of the model's weight files, e.g. fp16")
    model.add_argument("--prompt", required=True)
    model.add_argument("--negative-prompt", default="")
    model.add_argument("--steps", type=int, default=50, help="diffusion steps")
    model.add_argument("--guidance-scale", type=float, default=7.5, help="of classifier-free guidance")
    model.add_argument("--mix-weight", type=float, default=0.93, help="EDICT's p")
    model.add_argument("--height", type=int, help="in pixels (default: the model's own)")
    model.add_argument("--width", type=int, help="in pixels (default: the model's own)")
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    model.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the networks")
    guide = parser.add_argument_group("guidance")
    guide.add_argument("--guidance", required=True, choices=tuple(GUIDES))
    guide.add_argument("--guidance-prompt", help="for clip-text (default: the prompt)")
    guide.add_argument("--guidance-image", nargs="+", metavar="FILE", help="for clip-image")
    guide.add_argument("--label", help="for classifier: a class's name or index")
    guide.add_argument("--direction", choices=("horizontal", "vertical"), default="horizontal", help="for symmetry")
    guide.add_argument("--guidance-model", help=f"folder or hub id (default for CLIP: {DEFAULT_CLIP}; {EMBEDDED}: its)")
    guide.add_argument("--num-cutouts", type=int, default=0, help="random squares that CLIP looks at; 0: whole picture")
    guide.add_argument("--cut-power", type=float, default=0.3, help="lower prefers larger squares")
    update = parser.add_argument_group("optimisation")
    update.add_argument("--optimization-steps", type=int, default=50)
    update.add_argument("--learning-rate", type=float, default=1.0, help="multiplies the gradient before clipping")
    update.add_argument("--momentum", type=float, default=0.9)
    update.add_argument("--nesterov", action="store_true")
    update.add_argument("--clip-grad-value", type=_float_or_none, default=1e-3, help="or none")
    update.add_argument("--perturbation-scale", type=float, default=1e-4)
    update.add_argument("--no-tied", dest="tied", action="store_false", help="let the two latents part")
    update.add_argument("--no-renormalize", dest="renormalize", action="store_false")
    update.add_argument("--first-image-only", action="store_true", help="decode and score one of the two pictures")
    update.add_argument("--memory", type=_memory, default="checkpoint", help="checkpoint, reversible, auto, naive or k")
    update.add_argument("--memory-budget", help="for --memory auto, e.g. 6GiB (default: what is free)")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, required=True, help="folder for pictures, losses and state")
    files.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    files.add_argument("--save-every", type=int, default=1, metavar="N", help="optimisation steps between pictures")


def _float_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _memory(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _run(args: argparse.Namespace) -> int:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    continued = _check_out(args, settings)
    _quiet_libraries()
    import torch

    from ..diffusion.denoiser import Denoiser
    from ..diffusion.pipeline import Decoder, encode_prompt, initial_latents
    from ..diffusion.schedule import Schedule
    from ..optimization.loop import optimize
    from ..solvers.edict import EDICT

    device, dtype = _device(args.device), getattr(torch, DTYPES[args.dtype])
    pipeline = _load_pipeline(args, device, dtype)
    latents = initial_latents(pipeline, args.height, args.width, args.seed)
    schedule = Schedule.from_scheduler(pipeline.scheduler, args.steps)
    cond, uncond, extra = encode_prompt(
        pipeline, args.prompt, args.negative_prompt, height=args.height, width=args.width
    )
    denoiser = Denoiser(pipeline.unet, cond, uncond, args.guidance_scale, **extra)
    chain = EDICT(denoiser, schedule, args.mix_weight, args.memory, memory_budget=args.memory_budget)
    loss = GUIDES[args.guidance](args, device, dtype)
    began = time.perf_counter()
    # the losses' random cutouts come from the global generator
    torch.manual_seed(args.seed)
    result = optimize(
        chain,
        latents,
        Decoder(pipeline.vae),
        loss,
        args.optimization_steps,
        grad_scale=args.learning_rate,
        momentum=args.momentum,
        nesterov=args.nesterov,
        clip_grad_value=args.clip_grad_value,
        tied_latents=args.tied,
        renormalize_latents=args.renormalize,
        perturbation_scale=args.perturbation_scale,
        first_image_only=args.first_image_only,
        seed=args.seed,
        callback_on_step_end=_Writer(args.out, settings, args.save_every),
        folder=args.out / STATE,
        resume=continued,
    )
    _write_result(args.out, settings, result, time.perf_counter() - began)
    print(
        f"loss {result.losses[0]:.5g} -> {result.final_loss:.5g}, best {result.best_loss:.5g} after "
        f"{result.best_step} steps; pictures and {RESULT} in {args.out}"
    )
    return 0


def _check_out(args: argparse.Namespace, settings: dict[str, Any]) -> bool:
    """Whether a stored state is continued. Raises ValueError when the folder is taken; writes nothing."""
    out: Path = args.out
    if args.save_every < 1:
        raise ValueError(f"--save-every: expected at least 1, got {args.save_every}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {str(out)!r}")
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
    except ValueError as error:
        raise ValueError(f"--resume: {str(out / SETTINGS)!r} is damaged ({error}); start in another folder") from error
    for key, value in settings.items():
        if key not in MAY_CHANGE and stored.get(key) != value:
            raise ValueError(
                f"--resume: the run in {str(out)!r} had --{key.replace('_', '-')} {stored.get(key)!r}, got {value!r}; "
                "pass what it was started with, or another --out"
            )
    return (out / STATE / "state.json").exists()


def _device(name: str | None) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a CUDA device that PyTorch sees, got none; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _loaded(args: argparse.Namespace) -> Any:
    """The pipeline that --model, --variant, --device and --dtype ask for."""
    _quiet_libraries()
    import torch

    return _load_pipeline(args, _device(args.device), getattr(torch, DTYPES[args.dtype]))


def _load_pipeline(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    if args.model == EMBEDDED:
        from .. import shapes

        return shapes.load_pipeline(device=device, dtype=dtype)
    from ..diffusion.pipeline import load_pipeline

    return load_pipeline(args.model, device, dtype, args.variant)


# what a run writes


@dataclass(frozen=True)
class _Writer:
    """The callback that stores the settings and pictures as the run goes; its first call creates the folder."""

    out: Path
    settings: dict[str, Any]
    every: int

    def __call__(self, info: StepInfo) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / SETTINGS, self.settings)
        if info.step == 0:
            write_picture(self.out / "before.png", info.images[0])
        if info.step % self.every == 0:
            write_picture(self.out / f"step_{info.step:03d}.png", info.images[0])


def _write_result(out: Path, settings: dict[str, Any], result: Result, seconds: float) -> None:
    import torch

    from .. import __version__

    write_picture(out / "after.png", result.images[0])
    write_picture(out / "best.png", result.best_images[0])
    _plot(out / "losses.png", [*result.losses, result.final_loss], settings["guidance"])
    summary = {
        "losses": result.losses,
        "pair_losses": result.pair_losses,
        "final_loss": result.final_loss,
        "best_loss": result.best_loss,
        "best_step": result.best_step,
        "seconds": round(seconds, 3),
        "versions": {"doodl_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "options": settings,
    }
    write_json(out / RESULT, summary)


def _plot(path: Path, losses: Sequence[float], name: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(len(losses)), losses, marker="." if len(losses) < 60 else "")
    axes.set(xlabel="optimisation steps done", ylabel=f"loss ({name})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    replace(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


COMMANDS = {
    "demo": Command("optimise latents of the embedded pipeline and show what changes", _demo_arguments, _demo),
    "run": Command("optimise latents of a diffusers pipeline for a guide", _run_arguments, _run),
    "invert": Command("take a picture to the noise that leads to it, exactly", _invert_arguments, _invert),
    "generate": Command("make an inverted picture again, or edit it by another prompt", _generate_arguments, _generate),
    "drift": Command("measure how exactly chains come back, by arithmetic and length", _drift_arguments, _drift),
    "profile": Command("measure or estimate what gradients take in memory and time", _profile_arguments, _profile),
    "doctor": Command("say which kernel backends there are, and why others are missing", lambda parser: None, _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
