"""Trains the embedded pipeline from scratch: ``python -m doodl_fast.shapes.train --work DIR [--out DIR] [STAGE ...]``.

The stages are ``text`` (the UNet's text encoder, from which CLIP's text encoder starts), ``vae``, ``unet``, ``clip``
and ``classifier``; ``export`` then writes fp16 safetensors in the folders of diffusers and transformers. Everything is
seeded. Each stage stores a checkpoint every minute and continues from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .training.data import pictures
from .training.export import export
from .training.fit import RECIPES
from .training.stages import train_classifier, train_clip, train_text, train_unet, train_vae

STAGES = (*RECIPES, "export")


def stage(name: str) -> str:
    """Returns the name of a stage as it is. Raises ArgumentTypeError, which argparse prints, for an unknown name."""
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(STAGES)}, got {name!r}")
    return name


def main() -> None:
    """Runs the stages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse refuses an empty list where there are choices, in Python 3.10 and 3.11
    known = ", ".join(STAGES)
    parser.add_argument("stages", nargs="*", type=stage, metavar="STAGE", help=f"{known}; default: all, in this order")
    parser.add_argument("--work", type=Path, required=True, help="folder for the drawn pictures and the checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="where export writes")
    parser.add_argument("--start", type=Path, help="pipeline whose UNet the unet stage trains on (default: a new one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = pictures(args.work)
    for name in args.stages or STAGES:
        if name == "text":
            train_text(args.work)
        elif name == "vae":
            train_vae(args.work, data)
        elif name == "unet":
            train_unet(args.work, data, train_vae(args.work, data), args.start)
        elif name == "clip":
            train_clip(args.work, data)
        elif name == "classifier":
            train_classifier(args.work, data)
        else:
            export(args.work, args.out, data)


if __name__ == "__main__":
    main()
