"""What can be said of a command's options before its model is loaded."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import EMBEDDED

SCHEDULER, VAE = "scheduler/scheduler_config.json", "vae/config.json"


def check_sizes(
    args: argparse.Namespace, steps: Sequence[int], sizes: Sequence[str] = (), option: str = "num_inference_steps"
) -> None:
    """Checks counts, sizes and the guidance scale against what a local model's folder says of itself.

    A model that is not in a local folder is checked again, and more strictly, once it is loaded.

    Args:
        args: The command line: model, guidance_scale, and the options that `sizes` names.
        steps: The numbers of diffusion steps.
        sizes: The names of the options that are sizes of a picture in pixels, or None for the model's own.
        option: What an error calls the number of steps.

    Raises:
        ValueError: One of them cannot work.
    """
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        raise ValueError(f"guidance_scale: expected a finite number, got {args.guidance_scale}")
    most = read_config(args.model, SCHEDULER).get("num_train_timesteps")
    for count in steps:
        if isinstance(most, int) and not 1 <= count <= most:
            raise ValueError(f"{option}: expected an int from 1 to {most} (the training timesteps), got {count}")
        if count < 1:
            raise ValueError(f"{option}: expected an int of at least 1, got {count}")
    channels = read_config(args.model, VAE).get("block_out_channels")
    for name in sizes:
        size = getattr(args, name)
        if size is None:
            continue
        if isinstance(channels, list) and channels:
            from ..diffusion.latent_space import check_size

            check_size(name, size, 2 ** (len(channels) - 1))
        elif size < 1:
            raise ValueError(f"{name}: expected a positive number of pixels, got {size}")


def read_config(model: str, file: str) -> dict[str, Any]:
    """A JSON file of a local model; an empty dict if there is none, or none that can be read."""
    if model == EMBEDDED:
        from .. import shapes

        folder = shapes.WEIGHTS / "pipeline"
    else:
        folder = Path(model).expanduser()
    try:
        config = json.loads((folder / file).read_text())
    except (OSError, ValueError, RecursionError):  # The loading of the model says what is wrong.
        return {}
    return config if isinstance(config, dict) else {}
