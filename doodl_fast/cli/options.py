"""What the commands share: common options and the loading of models."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..diffusion.schedule import Schedule

EMBEDDED = "shapes"
"""The name of the embedded pipeline and of its guides, as a value of --model and --guidance-model."""
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The name in torch of the dtype that each value of --dtype stands for."""

SEEDS, LARGEST_SIDE, LARGEST_BATCH = 2**63 - 1, 2**15, 2**16
"""The largest seed, side of a picture in pixels, and number of pictures that a command line may ask for."""

Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def integer(most: int = 10**9) -> Callable[[str], int]:
    """An argparse type: a whole number in ASCII digits, of a magnitude of at most `most`."""

    def parse(text: str) -> int:
        if not text.isascii():
            raise argparse.ArgumentTypeError(f"invalid int value: {text!r}; expected ASCII digits")
        value = int(text)
        if abs(value) > most:
            raise argparse.ArgumentTypeError(f"expected at most {most}, got {value}")
        return value

    parse.__name__ = "int"  # argparse names it in "invalid int value"
    return parse


def number(text: str) -> float:
    """An argparse type: a number in ASCII digits."""
    if not text.isascii():
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}; expected ASCII digits")
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None


def device(value: str) -> str:
    """An argparse type: the name of a device that this package runs on."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", value):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:N or mps, got {value!r}")
    return value


def text(value: str) -> str:
    """An argparse type: a text that is not empty."""
    if not value.strip():
        raise argparse.ArgumentTypeError("expected a text, got an empty one")
    return value


def folder(value: str) -> Path:
    """An argparse type: the name of a folder or file, which is not empty."""
    return Path(text(value))


def add_model(parser: Parser, default: str | None = None) -> None:
    """Adds --model and --variant. A model is required unless there is a default."""
    line = f"diffusers folder, hub id, or {EMBEDDED!r} for the embedded one"
    parser.add_argument("--model", required=default is None, default=default, help=line)
    parser.add_argument("--variant", type=text, help="variant of the model's weight files, e.g. fp16")


def add_mix_weight(parser: Parser) -> None:
    """Adds --mix-weight to a command that knows EDICT alone."""
    parser.add_argument(
        "--mix-weight", type=number, default=0.93, help="p of EDICT: how much of itself each latent keeps in the mixing"
    )


def add_size(parser: Parser) -> None:
    """Adds --height and --width."""
    for name in ("--height", "--width"):
        parser.add_argument(
            name, type=integer(LARGEST_SIDE), help="of the picture, in pixels (default: the model's own)"
        )


def add_device(parser: Parser) -> None:
    """Adds --device."""
    parser.add_argument(
        "--device", type=device, metavar="DEVICE", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one)"
    )


def add_dtype(parser: Parser) -> None:
    """Adds --dtype."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="dtype of the networks")


def as_json(args: argparse.Namespace) -> dict[str, Any]:
    """A command's options as they are stored beside its results: paths become strings."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def quiet_libraries() -> None:
    """Silences the advice and progress bars of diffusers and transformers, which would bury what a command prints."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()


def check_folder(out: Path) -> None:
    """Raises ValueError unless --out can be a folder."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {str(out)!r}")


def check_model(model: str, index: str = "model_index.json", argument: str = "model") -> None:
    """Raises ValueError for a name that is neither a folder with the file `index` in it nor a possible hub id."""
    if model == EMBEDDED and argument == "model":
        return
    from ..diffusion.networks import check_source

    try:
        check_source(model, index, argument)
    except RuntimeError as error:  # from expanduser
        raise ValueError(f"{argument}: the folder {model!r} does not exist ({error})") from error


def find_device(name: str | None) -> torch.device:
    """The device that --device names. Raises ValueError for a GPU that is not there."""
    import torch

    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device: expected a CUDA device that PyTorch sees, got none; use --device cpu")
    if name is not None and ":" in name and int(name.partition(":")[2]) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: expected one of the {torch.cuda.device_count()} CUDA devices that PyTorch sees, counted from "
            f"cuda:0, got {name}"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device: expected a device that PyTorch sees, got mps, which is not there; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def find_dtype(name: str) -> torch.dtype:
    """The dtype that --dtype names."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def load_pipeline(args: argparse.Namespace) -> Any:
    """The diffusers pipeline that --model, --variant, --device and --dtype ask for."""
    check_model(args.model)
    if args.model == EMBEDDED and args.variant is not None:
        raise ValueError(f"--variant: expected none, as the embedded model has no variants, got {args.variant!r}")
    quiet_libraries()
    device, dtype = find_device(args.device), find_dtype(args.dtype)
    if args.model == EMBEDDED:
        from .. import shapes

        return shapes.load_pipeline(device=device, dtype=dtype)
    from ..diffusion.pipeline import load_pipeline

    return load_pipeline(args.model, device, dtype, args.variant)


def last_part(schedule: Schedule, share: float) -> Schedule:
    """The share of a schedule that is nearest to the image, at least one step."""
    from dataclasses import replace

    first = len(schedule) - max(1, round(share * len(schedule)))
    # A flow has no cumulative alphas, and a diffusion no sigmas.
    names = ("timesteps", "alphas_cumprod", "alphas_cumprod_prev", "sigmas")
    return replace(schedule, **{name: getattr(schedule, name)[first:] for name in names})


def without_offset(scheduler: Any) -> Any:
    """The same scheduler without an offset of its steps.

    An offset of 1, which many schedulers have, leaves no room for as many steps as there are timesteps.
    """
    if not scheduler.config.get("steps_offset"):
        return scheduler
    return type(scheduler).from_config(scheduler.config, steps_offset=0)
