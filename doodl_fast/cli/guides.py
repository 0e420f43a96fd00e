"""The guides of `doodl-fast run`. A function for each makes its loss of (the arguments, device, dtype)."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .losses import guide_names, own_loss, weighted
from .options import EMBEDDED, Parser, check_model, integer, number, text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Guide = Callable[[Tensor], Tensor]

DEFAULT_CLIP = "openai/clip-vit-large-patch14"


Load = Callable[[str, argparse.Namespace, "torch.device", "torch.dtype"], tuple[Any, Any]]
"""Loads the model of a guide, "clip" or "classifier", and its processor. A sweep hands over one that keeps them."""


def is_embedded(args: argparse.Namespace) -> bool:
    """Whether a guide's model is the embedded one."""
    return args.model == EMBEDDED and args.guidance_model in (None, EMBEDDED)


def load_guide(kind: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Loads the model of a guide, "clip" or "classifier", and its processor."""
    if is_embedded(args):
        from .. import shapes

        model, processor = shapes.load_clip() if kind == "clip" else shapes.load_classifier()
        return model.to(device, dtype), processor
    if kind == "clip":
        from ..guidance.clip import load_clip

        return load_clip(args.guidance_model or DEFAULT_CLIP, device, dtype)
    if args.guidance_model is None:
        raise ValueError("--guidance-model: expected an image classifier with --guidance classifier, got none")
    from ..guidance.classifier import load_classifier

    return load_classifier(args.guidance_model, device, dtype)


def _clip_text(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of CLIP guidance to a text."""
    from ..guidance import ClipText

    model, processor = load("clip", args, device, dtype)
    return ClipText(model, processor, _target_text(args), args.num_cutouts, args.cut_power)


def _clip_image(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of CLIP guidance to pictures."""
    from ..guidance import ClipImage

    if not args.guidance_image:
        raise ValueError("--guidance-image: expected one or more files with --guidance clip-image, got none")
    model, processor = load("clip", args, device, dtype)
    return ClipImage(model, args.guidance_image, processor, args.num_cutouts, args.cut_power)


def _classifier(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of guidance to a class of an image classifier."""
    from ..guidance import Classifier

    if args.label is None:
        raise ValueError("--label: expected a class's name or index with --guidance classifier, got none")
    model, processor = load("classifier", args, device, dtype)
    return Classifier(model, processor, args.label)


def _symmetry(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of guidance to mirror symmetry."""
    from ..guidance import Symmetry

    return Symmetry(args.direction)


def _picture(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of the distance to a picture."""
    from ..guidance import Picture

    return Picture(args.target)


MAKERS: dict[str, Callable[[argparse.Namespace, torch.device, torch.dtype, Load], Guide]] = {
    "clip-text": _clip_text,
    "clip-image": _clip_image,
    "classifier": _classifier,
    "symmetry": _symmetry,
    "picture": _picture,
}


def guides(load: Load = load_guide) -> dict[str, Callable[[argparse.Namespace, torch.device, torch.dtype], Guide]]:
    """By name what makes each guide.

    Args:
        load: Loads the models of guides.
    """

    def with_load(make: Callable[..., Guide]) -> Callable[[argparse.Namespace, torch.device, torch.dtype], Guide]:
        return lambda args, device, dtype: make(args, device, dtype, load)

    return {name: with_load(make) for name, make in MAKERS.items()}


def add_arguments(parser: Parser) -> None:
    """Adds the options that choose and describe a guide."""
    parser.add_argument(
        "--guidance",
        nargs="+",
        type=weighted(tuple(MAKERS)),
        metavar="GUIDE[:WEIGHT]",
        help=f"one or several of {', '.join(MAKERS)}, e.g. clip-text symmetry:0.1",
    )
    parser.add_argument(
        "--loss",
        nargs="+",
        type=own_loss,
        metavar="MODULE:FUNCTION[:WEIGHT]",
        help="functions of your own, from images (B, 3, H, W) to a scalar; modules are found from the current folder",
    )
    parser.add_argument("--guidance-prompt", help="for clip-text (default: the prompt)")
    parser.add_argument("--guidance-image", nargs="+", type=text, metavar="FILE", help="for clip-image")
    parser.add_argument("--target", type=text, metavar="FILE", help="for picture: the picture to come near to")
    parser.add_argument("--label", type=text, help="for classifier: a class's name or index")
    parser.add_argument("--direction", choices=("horizontal", "vertical"), help="for symmetry (default: horizontal)")
    parser.add_argument(
        "--guidance-model", type=text, help=f"folder or hub id (default for CLIP: {DEFAULT_CLIP}; {EMBEDDED}: its)"
    )
    parser.add_argument(
        "--num-cutouts", type=integer(10**5), help="random squares that CLIP sees; 0 is the whole picture (default: 0)"
    )
    parser.add_argument("--cut-power", type=number, help="lower prefers larger squares (default: 0.3)")


USES: dict[str, tuple[str, ...]] = {
    "clip-text": ("guidance_prompt", "guidance_model", "num_cutouts", "cut_power"),
    "clip-image": ("guidance_image", "guidance_model", "num_cutouts", "cut_power"),
    "classifier": ("label", "guidance_model"),
    "symmetry": ("direction",),
    "picture": ("target",),
}
"""The options that each guide reads. Any other option of a guide is refused."""
DEFAULTS = {"direction": "horizontal", "num_cutouts": 0, "cut_power": 0.3}
"""What an option is when it is not given. The parser does not know these, so that a given option can be told."""


def check_guide(args: argparse.Namespace) -> None:
    """Checks the options of the guide before anything is loaded, and fills in the defaults.

    Raises:
        ValueError: An option belongs to another guide, is missing, or cannot work.
    """
    names = guide_names(args)
    if not names and not args.loss:
        raise ValueError(f"--guidance: expected one of {', '.join(MAKERS)}, or --loss, got neither")
    if len(set(names)) < len(names):
        raise ValueError(f"--guidance: expected each guide once, got {' '.join(names)}")
    if args.guidance is not None and len(args.guidance) == 1:
        args.guidance = args.guidance[0]  # as runs were stored that could have one guide alone
    used = {name for guide in names for name in USES[guide]}
    for name in dict.fromkeys(name for options in USES.values() for name in options):
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS.get(name))
        elif name not in used:
            guides = " and ".join(guide for guide, options in USES.items() if name in options)
            flag, got = name.replace("_", "-"), f"--guidance {' '.join(names)}" if names else "--loss alone"
            raise ValueError(f"--{flag}: expected --guidance {guides} with it, got {got}; omit it")
    if not (math.isfinite(args.cut_power) and args.cut_power > 0):
        raise ValueError(f"--cut-power: expected a positive finite number, got {args.cut_power}")
    if args.num_cutouts < 0:
        raise ValueError(f"--num-cutouts: expected at least 0, got {args.num_cutouts}")
    if "clip-text" in names and not _target_text(args).strip():
        raise ValueError("--guidance-prompt: prompt: expected a text to guide to, got none")
    if "clip-image" in names and not args.guidance_image:
        raise ValueError("--guidance-image: expected one or more files with --guidance clip-image, got none")
    if "classifier" in names and args.label is None:
        raise ValueError("--label: expected a class's name or index with --guidance classifier, got none")
    embedded = args.model == EMBEDDED and args.guidance_model in (None, EMBEDDED)
    if "classifier" in names and args.guidance_model is None and not embedded:
        raise ValueError("--guidance-model: expected an image classifier with --guidance classifier, got none")
    if "picture" in names and args.target is None:
        raise ValueError("--target: expected a picture file with --guidance picture, got none")
    if args.guidance_model is not None and "classifier" in names and {"clip-text", "clip-image"} & set(names):
        raise ValueError(
            "--guidance-model: expected it with one kind of model alone, got it with CLIP and a classifier"
        )
    _check_files(args, embedded, names)


def _check_files(args: argparse.Namespace, embedded: bool, names: list[str]) -> None:
    """Raises ValueError for a guide's folder that cannot be one, a picture that cannot be read, an unknown label."""
    if args.guidance_model is not None and not embedded:
        check_model(args.guidance_model, "config.json", "guidance model")
        config = Path(args.guidance_model).expanduser() / "config.json"
        if "classifier" in names and config.is_file():
            _check_label(args.label, config)
    if args.guidance_image:
        from ..diffusion.images import read_picture

        for file in args.guidance_image:
            read_picture(file, "--guidance-image")
    if args.target is not None:
        from ..diffusion.images import read_picture

        read_picture(args.target, "--target")


def _check_label(label: str, config: Path) -> None:
    """Raises ValueError for a label that is not in a classifier's config. Other faults are left to the loading."""
    from ..guidance.classifier import find_label

    try:
        names = {int(index): str(name) for index, name in json.loads(config.read_text())["id2label"].items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return
    find_label(label, names)


def _target_text(args: argparse.Namespace) -> str:
    """The text that CLIP guides to."""
    return str(args.prompt if args.guidance_prompt is None else args.guidance_prompt)
