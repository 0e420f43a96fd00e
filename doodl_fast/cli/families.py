"""What the commands do for every family of pipelines: options of a family's own, prompts, schedules and frames."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import read_config
from .options import LARGEST_BATCH, Parser, integer, number

if TYPE_CHECKING:
    from ..diffusion.families import Family
    from ..solvers.base import DiffusionChain

PROMPT = "a red circle"
"""The prompt of commands that measure, where none is given."""


def add_prompt(parser: Parser, line: str) -> None:
    """Adds --prompt and --negative-prompt."""
    parser.add_argument("--prompt", help=line)
    parser.add_argument("--negative-prompt", help="(default: what the pipeline does without one)")


def add_guidance_scale(parser: Parser, line: str = "(default: the family's own)") -> None:
    """Adds --guidance-scale."""
    parser.add_argument(
        "--guidance-scale",
        type=number,
        help=f"weight of classifier-free guidance; with at most 1 the prompt alone is used {line}",
    )


def add_own_options(parser: Parser) -> None:
    """Adds --num-frames and --option, by which arguments of a family's own are given."""
    parser.add_argument(
        "--num-frames", type=integer(LARGEST_BATCH), help="of a video (default: the model's own)", metavar="N"
    )
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument of the pipeline (true_cfg_scale=3, max_sequence_length=128, class_labels=[207], "
        "image=edges.png); may be repeated",
    )


def _option(text: str) -> str:
    """An argparse type: a name, "=" and a value."""
    name, equals, _ = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return text


def own_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `from_pipeline` that --num-frames and --option give.

    A value is read as JSON, or else taken as a text. A text whose name ends in "image" is the file of a picture.

    Raises:
        ValueError: A name is given twice, or is that of an option of the command line.
    """
    found: dict[str, Any] = {} if args.num_frames is None else {"num_frames": args.num_frames}
    for text in args.option:
        name, _, value = text.partition("=")
        if name in found:
            raise ValueError(f"--option: expected {name} once, got it twice")
        if name in vars(args) or name == "num_inference_steps":
            raise ValueError(f"--option: {name} has an option of its own; see --help")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
        if name.endswith("image") and isinstance(found[name], str):
            from ..diffusion.images import open_picture, to_pil

            found[name] = to_pil(open_picture(Path(found[name]), name))[0]
    return found


def family_of_folder(model: str) -> Family | None:
    """The family of a local model, by its model_index.json; None for a hub id.

    Raises:
        ValueError: No family serves the model, a component is missing, or one would be ignored.
    """
    from ..diffusion.families.saved import family_of_index

    index = read_config(model, "model_index.json")
    return family_of_index(index, model) if index else None


def fill_guidance_scale(args: argparse.Namespace) -> None:
    """Writes Stable Diffusion's own guidance scale into the command line where none is given.

    Results have stored this number since before there were other families, whose own scale is stored as None.
    """
    from ..diffusion.families.stable_diffusion import StableDiffusion

    if args.guidance_scale is None:
        family = family_of_folder(args.model)
        args.guidance_scale = family.guidance_scale if isinstance(family, StableDiffusion) else None


def check_prompt(args: argparse.Namespace, default: str | None = None) -> None:
    """Checks before anything is loaded whether the model takes a prompt, and fills in the default.

    A model that is not in a local folder is checked once it is loaded.

    Args:
        args: The command line: model, prompt, negative_prompt.
        default: The prompt where none is given; None requires one.

    Raises:
        ValueError: There is no prompt, or the model takes none; and as `family_of_folder`.
    """
    family = family_of_folder(args.model)
    if family is not None and not family.takes_text:
        for name in ("prompt", "negative_prompt"):
            if getattr(args, name) is not None:
                flag, kind = name.replace("_", "-"), type(family).__name__
                raise ValueError(
                    f"--{flag}: expected none, because models of the family {kind} have no text, got "
                    f"{getattr(args, name)!r}"
                )
        return
    if args.prompt is None:
        args.prompt = default
    if args.prompt is None and family is not None:
        raise ValueError("--prompt: expected a text, which says what the picture shows, got none")


def timestep_options(args: argparse.Namespace, pipeline: Any) -> Callable[[int], dict[str, Any]]:
    """What the pipeline gives its scheduler beside a number of steps (a flow's mu and sigmas), as a function of it."""
    from dataclasses import replace

    from ..diffusion.families import Request, family_of

    family = family_of(pipeline)
    request = Request(height=args.height, width=args.width, options=own_options(args))

    def options(steps: int) -> dict[str, Any]:
        return family.set_timesteps(pipeline, replace(request, num_inference_steps=steps))

    return options


def check_picture(chain: DiffusionChain) -> None:
    """Raises ValueError for a chain of waveforms, or of videos of several frames, of which a picture is no example."""
    from ..diffusion.audio import AudioDecoder

    if isinstance(chain.decode, AudioDecoder):
        raise ValueError(
            "IMAGE: this model makes waveforms, of which a picture is no example; they are inverted in Python, with "
            "chain.decode.encode and chain.inverse_state"
        )
    frames = getattr(chain.space, "num_frames", 1)
    if frames != 1:
        raise ValueError(
            f"IMAGE: expected --num-frames 1 with a model of videos, as a picture is one frame, got {frames} frames; "
            "videos are inverted in Python, with chain.decode.encode and chain.inverse_state"
        )


def frames_decoder(chain: DiffusionChain) -> tuple[Any, int | None]:
    """The chain's decoder, which gives the frames of videos as pictures, and their number; None for pictures.

    Raises:
        ValueError: The chain makes waveforms.
    """
    from ..diffusion.audio import AudioDecoder
    from ..diffusion.video import VideoDecoder, VideoSpace

    decode, space = chain.decode, chain.space
    if isinstance(decode, AudioDecoder):
        raise ValueError(
            "model: it makes waveforms, which the guides of the command line cannot score; pass doodl_fast.optimize a "
            "loss of yours"
        )
    if isinstance(decode, VideoDecoder) and isinstance(space, VideoSpace):
        return decode.pictures(), space.num_frames
    return decode, None
