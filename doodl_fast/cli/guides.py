"""The guides of `doodl-fast run`. A function for each makes its loss of (the arguments, device, dtype)."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .guide_models import DEFAULT_CLIP, check_models, is_embedded, load_guide, model_of
from .losses import guide_names, own_loss, weighted
from .options import EMBEDDED, Parser, integer, number, text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Guide = Callable[[Tensor], Tensor]

Load = Callable[[str, argparse.Namespace, "torch.device", "torch.dtype"], tuple[Any, Any]]
"""Loads the model of a guide, and its processor. A sweep hands over one that keeps them."""


def _clip_text(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of CLIP guidance to a text."""
    from ..guidance import ClipText

    model, processor = load("clip-text", args, device, dtype)
    return ClipText(model, processor, _target_text(args), args.num_cutouts, args.cut_power)


def _clip_image(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of CLIP guidance to pictures."""
    from ..guidance import ClipImage

    if not args.guidance_image:
        raise ValueError("--guidance-image: expected one or more files with --guidance clip-image, got none")
    model, processor = load("clip-image", args, device, dtype)
    return ClipImage(model, args.guidance_image, processor, args.num_cutouts, args.cut_power)


def _aesthetic(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of an aesthetic score."""
    from ..guidance import Aesthetic
    from ..guidance.aesthetic import load_aesthetic_head

    head = load_aesthetic_head(args.guidance_head)
    model, processor = load("aesthetic", args, device, dtype)
    return Aesthetic(model, processor, head, None, args.num_cutouts, args.cut_power)


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


def _text_reward(kind: str, guide: str) -> Callable[..., Guide]:
    """What makes the loss of a reward for a text.

    Args:
        kind: The name of its class.
        guide: Its own name.
    """

    def make(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
        from .. import guidance

        made: Guide = getattr(guidance, kind)(*load(guide, args, device, dtype), _target_text(args))
        return made

    return make


def _similarity(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of the similarity to a picture."""
    from ..guidance import Similarity

    model, processor = load("similarity", args, device, dtype)
    return Similarity(model, args.target, processor, look=args.look)


def _segmentation(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of guidance to a class of all pixels, or to the classes of a picture."""
    from ..guidance import Segmentation

    model, processor = load("segmentation", args, device, dtype)
    return Segmentation(model, Path(args.target) if args.label is None else args.label, processor)


def _depth(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, load: Load) -> Guide:
    """Makes the loss of guidance to the depth of a picture."""
    from ..guidance import Depth

    model, processor = load("depth", args, device, dtype)
    return Depth(model, args.target, processor)


MAKERS: dict[str, Callable[[argparse.Namespace, torch.device, torch.dtype, Load], Guide]] = {
    "clip-text": _clip_text,
    "clip-image": _clip_image,
    "aesthetic": _aesthetic,
    "classifier": _classifier,
    "symmetry": _symmetry,
    "picture": _picture,
    "text-score": _text_reward("TextScore", "text-score"),
    "pick-score": _text_reward("PickScore", "pick-score"),
    "hpsv2": _text_reward("HPSv2", "hpsv2"),
    "image-reward": _text_reward("ImageReward", "image-reward"),
    "similarity": _similarity,
    "segmentation": _segmentation,
    "depth": _depth,
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
    parser.add_argument("--guidance-prompt", help="for clip-text and the rewards for texts (default: the prompt)")
    parser.add_argument("--guidance-image", nargs="+", type=text, metavar="FILE", help="for clip-image")
    parser.add_argument(
        "--target",
        type=text,
        metavar="FILE",
        help="for picture and similarity: the picture to come near to; for depth and segmentation: whose depth or "
        "classes are wanted",
    )
    parser.add_argument("--label", type=text, help="for classifier and segmentation: a class's name or index")
    parser.add_argument("--look", choices=("whole", "patches"), help="for similarity (default: whole)")
    parser.add_argument("--direction", choices=("horizontal", "vertical"), help="for symmetry (default: horizontal)")
    parser.add_argument(
        "--guidance-model",
        nargs="+",
        type=text,
        metavar="[GUIDE=]MODEL",
        help=f"folder, file or hub id, for one guide or for each (default for CLIP: {DEFAULT_CLIP}; {EMBEDDED}: its)",
    )
    parser.add_argument(
        "--guidance-head",
        type=text,
        metavar="FILE",
        help="for aesthetic: the file of the head, .pth or .safetensors, for the CLIP or SigLIP of --guidance-model",
    )
    parser.add_argument(
        "--guidance-processor",
        nargs="+",
        type=text,
        metavar="[GUIDE=]FOLDER",
        help="of the tokenizer and the processor, for rewards whose model has none in its folder",
    )
    parser.add_argument(
        "--num-cutouts", type=integer(10**5), help="random squares that CLIP sees; 0 is the whole picture (default: 0)"
    )
    parser.add_argument("--cut-power", type=number, help="lower prefers larger squares (default: 0.3)")


USES: dict[str, tuple[str, ...]] = {
    "clip-text": ("guidance_prompt", "guidance_model", "num_cutouts", "cut_power"),
    "clip-image": ("guidance_image", "guidance_model", "num_cutouts", "cut_power"),
    "aesthetic": ("guidance_head", "guidance_model", "num_cutouts", "cut_power"),
    "classifier": ("label", "guidance_model"),
    "symmetry": ("direction",),
    "picture": ("target",),
    **dict.fromkeys(
        ("text-score", "pick-score", "hpsv2", "image-reward"),
        ("guidance_prompt", "guidance_model", "guidance_processor"),
    ),
    "similarity": ("target", "guidance_model", "look"),
    "segmentation": ("target", "label", "guidance_model"),
    "depth": ("target", "guidance_model"),
}
"""The options that each guide reads. Any other option of a guide is refused."""
DEFAULTS = {"direction": "horizontal", "num_cutouts": 0, "cut_power": 0.3, "look": "whole"}
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
    for name in ("guidance_model", "guidance_processor"):
        if isinstance(getattr(args, name), list) and len(getattr(args, name)) == 1:
            setattr(args, name, getattr(args, name)[0])
    used = {name for guide in names for name in USES[guide]}
    for name in dict.fromkeys(name for options in USES.values() for name in options):
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS.get(name))
        elif name not in used:
            guides = " or ".join(guide for guide, options in USES.items() if name in options)
            flag, got = name.replace("_", "-"), f"--guidance {' '.join(names)}" if names else "--loss alone"
            raise ValueError(f"--{flag}: expected --guidance {guides} with it, got {got}; omit it")
    if not (math.isfinite(args.cut_power) and args.cut_power > 0):
        raise ValueError(f"--cut-power: expected a positive finite number, got {args.cut_power}")
    if args.num_cutouts < 0:
        raise ValueError(f"--num-cutouts: expected at least 0, got {args.num_cutouts}")
    for name in names:
        _check_what_it_needs(args, name)
    check_models(args, names)
    _check_files(args, names)


def _check_what_it_needs(args: argparse.Namespace, name: str) -> None:
    """Raises ValueError if an option that a guide needs was not given."""
    if "guidance_prompt" in USES[name] and not _target_text(args).strip():
        raise ValueError("--guidance-prompt: prompt: expected a text to guide to, got none")
    if name == "clip-image" and not args.guidance_image:
        raise ValueError("--guidance-image: expected one or more files with --guidance clip-image, got none")
    if name == "aesthetic" and (args.guidance_head is None or not Path(args.guidance_head).expanduser().is_file()):
        raise ValueError(
            '--guidance-head: expected the file of a head, e.g. "sac+logos+ava1-l14-linearMSE.pth", with --guidance '
            f"aesthetic, got {args.guidance_head or 'none'}"
        )
    if name == "classifier" and args.label is None:
        raise ValueError("--label: expected a class's name or index with --guidance classifier, got none")
    if name == "segmentation" and args.label is None and args.target is None:
        raise ValueError("--label: expected a class, or a picture as --target, with --guidance segmentation, got none")
    if name in ("picture", "similarity", "depth") and args.target is None:
        raise ValueError(f"--target: expected a picture file with --guidance {name}, got none")


def _check_files(args: argparse.Namespace, names: list[str]) -> None:
    """Raises ValueError for a picture that cannot be read, or a label that a model's folder does not name."""
    for name in ("classifier", "segmentation"):
        model = model_of(args, name) if name in names and args.label is not None else None
        if model is not None and not is_embedded(args, name):
            config = Path(model).expanduser() / "config.json"
            if config.is_file():
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
    """The text that guides for texts get."""
    return str(args.prompt if args.guidance_prompt is None else args.guidance_prompt)
