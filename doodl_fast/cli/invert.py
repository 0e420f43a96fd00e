"""`doodl-fast invert`: takes a picture to the noise that leads to it. What it shares with `generate` is in `edit`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from . import options
from .checks import check_sizes
from .edit import (
    ENCODED,
    IMAGE,
    INDEX,
    LARGEST_DEVIATION,
    NOISE,
    PICTURE,
    SETTINGS,
    advice,
    as_tensor,
    decoded,
    describe,
    encoded,
    fingerprint,
    fit,
    in_range,
    make_chain,
    open_image,
    picture_error,
    picture_of,
)
from .families import add_guidance_scale, add_own_options, add_prompt, check_picture, check_prompt, own_options
from .files import new_folder, write_json, write_picture
from .solvers import EDICT, INVERTIBLE, add_solver, check_solver

GUIDANCE = 3.0
"""The largest guidance scale that is used where none is given: inversions with more of it lead to poor noise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "image", type=options.folder, metavar="IMAGE", help="any picture file; its centre is cut out and resized"
    )
    options.add_model(parser)
    add_prompt(parser, "what the picture shows; required where the model takes a prompt")
    parser.add_argument("--steps", type=options.integer(), default=50, help="diffusion steps of the whole schedule")
    parser.add_argument(
        "--strength", type=options.number, default=0.8, help="share of the schedule that is gone through"
    )
    add_guidance_scale(parser, f"(default: the family's own, at most {GUIDANCE:g})")
    add_solver(parser, INVERTIBLE)
    parser.add_argument("--arithmetic", choices=("exact", "exact64"), default="exact", help="integers of 32 or 64 bits")
    options.add_size(parser)
    add_own_options(parser)
    options.add_device(parser)
    options.add_dtype(parser)
    parser.add_argument(
        "--out", type=options.folder, required=True, metavar="STATE", help="folder for the state and pictures"
    )


def run(args: argparse.Namespace) -> int:
    """Takes a picture to its noise; writes both ends' states, what belongs to them, and pictures."""
    from ..diffusion.families import family_of

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out: expected a new or empty folder, got {str(args.out)!r}, which is taken")
    if not 0 < args.strength <= 1:
        raise ValueError(f"--strength: expected a number in (0, 1], got {args.strength}")
    check_solver(args)
    options.check_model(args.model)
    check_prompt(args)
    own_options(args)
    check_sizes(args, [args.steps], ("height", "width"))
    picture = open_image(args.image)
    pipeline = options.load_pipeline(args)
    if args.guidance_scale is None:
        args.guidance_scale = min(GUIDANCE, family_of(pipeline).guidance_scale)
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.model != options.EMBEDDED and Path(args.model).expanduser().is_dir():
        settings["model"] = os.path.abspath(Path(args.model).expanduser())
    chain, whole = make_chain(pipeline, settings)
    check_picture(whole)
    settings |= {"height": whole.space.height, "width": whole.space.width}
    pixels = as_tensor(fit(picture, whole.space.height, whole.space.width)).to(whole.space.device)
    with in_range(advice(settings, chain)):
        image = chain.state(encoded(whole.decode, pixels), end="image")
        noise = chain.inverse_state(image)
    again = decoded(whole.decode, picture_of(chain, image))
    report = {"vae_error": picture_error(again, pixels), **describe(chain, noise)}
    with new_folder(args.out) as folder:
        noise.save(folder / NOISE)
        image.save(folder / IMAGE)
        write_picture(folder / PICTURE, pixels)
        write_picture(folder / ENCODED, again)
        index = {"settings": settings, "image": str(args.image), "weights": fingerprint(pipeline), "report": report}
        write_json(folder / INDEX, index)
    apart = "|x - y| / |x|" if args.solver in (EDICT, "rex") else "|y| / |x|"
    print(f"the noise: standard deviation {report['deviation']:.3g}, {apart} = {report['parted']:.2g}")
    if report["deviation"] > LARGEST_DEVIATION:
        print(
            "that is louder than noise that the model knows, so edits may be poor: try a prompt that describes the "
            "picture better, or a lower --guidance-scale or --strength"
        )
    print(f"the VAE's error: {report['vae_error']:.3g} of 255 (rms); states and pictures in {args.out}")
    return 0
