"""`doodl-fast generate`: makes an inverted picture again, or edits it by another prompt."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from . import options
from .edit import (
    EDITED,
    ENCODED,
    INDEX,
    LARGEST_DIFFERENCE,
    PICTURE,
    SAME,
    check_shape,
    decoded,
    describe,
    differing,
    fingerprint,
    in_range,
    make_chain,
    picture_error,
    picture_of,
    read_state,
)
from .files import write_json, write_picture
from .solvers import INVERTIBLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("state", type=options.folder, metavar="STATE", help="folder that invert wrote")
    parser.add_argument("--prompt", help="(default: the inverted one, which gives the picture back)")
    parser.add_argument("--negative-prompt", help="(default: the inverted one)")
    parser.add_argument("--guidance-scale", type=options.number, help="(default: the inverted one)")
    parser.add_argument("--solver", choices=INVERTIBLE, help="must be the inversion's (default: the inversion's)")
    parser.add_argument("--model", type=options.text, help="where the same model lies now (default: where it was)")
    options.add_device(parser)
    parser.add_argument("--out", type=options.folder, metavar="PNG", help=f"(default: {SAME} or {EDITED} in STATE)")


def run(args: argparse.Namespace) -> int:
    """Runs an inverted picture's noise forward; 1 if the same settings did not lead back to the same bits."""
    stored = read_state(args.state)
    if args.solver not in (None, stored.settings["solver"]):
        raise ValueError(
            f"--solver: {str(args.state)!r} was inverted with {stored.settings['solver']}, got {args.solver}; omit it, "
            f"or invert the picture again with --solver {args.solver}"
        )
    given = {name: getattr(args, name) for name in ("prompt", "negative_prompt", "guidance_scale")}
    if args.prompt is not None and stored.settings["prompt"] is None:
        raise ValueError(f"--prompt: expected none, as {str(args.state)!r} was inverted without, got {args.prompt!r}")
    settings = stored.settings | {name: value for name, value in given.items() if value is not None}
    if not math.isfinite(settings["guidance_scale"]):
        raise ValueError(f"guidance_scale: expected a finite number, got {settings['guidance_scale']}")
    same = settings == stored.settings
    out = args.out or args.state / (SAME if same else EDITED)
    if not out.parent.is_dir() or out.is_dir() or out.suffix != ".png":
        raise ValueError(f"--out: expected a .png file in an existing folder, got {str(out)!r}")
    if out.stem in (Path(PICTURE).stem, Path(ENCODED).stem, Path(INDEX).stem):
        raise ValueError(f"--out: expected another name than those that invert gives, got {str(out)!r}")
    model = {"model": args.model or settings["model"], "variant": settings["variant"], "dtype": settings["dtype"]}
    pipeline = options.load_pipeline(argparse.Namespace(**model, device=args.device))
    if fingerprint(pipeline) != stored.weights:
        raise ValueError(
            f"STATE: {str(args.state)!r} was made with other weights than those of {model['model']!r}; pass --model "
            "with the folder of the model that it was made with"
        )
    chain, whole = make_chain(pipeline, settings)
    check_shape(stored, whole)
    noise, image = (state.to(whole.space.device) for state in (stored.noise, stored.image))
    with in_range("Try a lower --guidance-scale, or invert with --arithmetic exact64"):
        reached = chain.forward_state(noise)
    pixels, encoded = (decoded(whole.decode, picture_of(chain, state)) for state in (reached, image))
    equal = reached.equals(image)
    report = {
        "equal": equal,
        "differing": differing(reached, image),
        "vae_error": stored.report["vae_error"],
        "change": picture_error(pixels, encoded),
        "parted": describe(chain, reached)["parted"],
    }
    write_picture(out, pixels)
    write_json(out.with_suffix(".json"), {"settings": settings, "same_settings": same, "report": report})
    print(_said(report, settings["solver"], same, out))
    return int(same and not equal)


def _said(report: dict[str, Any], solver: str, same: bool, out: Path) -> str:
    """What the command prints about its result."""
    vae, change = (f"{report[name]:.3g} of 255 (rms)" for name in ("vae_error", "change"))
    if not same:
        said = f"edited: the picture changed by {change}, |x - y| / |x| = {report['parted']:.2g}; {out}"
        if report["parted"] > LARGEST_DIFFERENCE:
            names = {"edict": "--mix-weight", "bdia": "--gamma", "rex": "--zeta"}
            lower = f"a lower {names[solver]}, " if solver in names else ""
            said += f"\nthe two latents have parted: invert with {lower}less guidance or more --steps"
        return said
    if report["equal"]:
        return (
            f"the encoded latents came back bit for bit; the picture's error is {vae} by the VAE, 0 by the chain; {out}"
        )
    return (
        f"the encoded latents did not come back: {report['differing']:.2%} of their integers differ; the picture's "
        f"error is {vae} by the VAE, {change} by the chain. Look for another device or kernels than those of the "
        "inversion, or for a network that does not return the same bits twice (torch.use_deterministic_algorithms); "
        f"{out}"
    )
