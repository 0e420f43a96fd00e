"""`doodl-fast invert` and `doodl-fast generate`: a picture taken to noise by exact EDICT, made again, and edited.

A picture is inverted under a prompt that describes it and generated under another (EDICT, Wallace et al., CVPR 2023,
arXiv 2211.12446). On the lattice of exact arithmetic the same prompt gives the encoded latents back to the bit, which
is checked; what a reconstruction then still lacks is the VAE's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import new_folder, write_json, write_picture
from .guides import EMBEDDED

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from ..chain.exact.state import LatticeState
    from ..diffusion.schedule import Schedule
    from ..solvers.edict import EDICT

Load = Callable[[argparse.Namespace], Any]
"""Loads the diffusers pipeline that a command line names."""

PICTURE, ENCODED, NOISE, IMAGE, INDEX = (
    "picture.png",
    "encoded.png",
    "noise.safetensors",
    "image.safetensors",
    "invert.json",
)
SAME, EDITED = "reconstruction.png", "edit.png"
SETTINGS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "variant": (str, type(None)),
    "dtype": str,
    "prompt": str,
    "negative_prompt": str,
    "steps": int,
    "strength": float,
    "guidance_scale": float,
    "mix_weight": float,
    "arithmetic": str,
    "height": int,
    "width": int,
}
"""what generate must know of invert, and its type in the file"""
LOUD, PARTED = 1.5, 1.0
"""Standard deviation of the noise, and |x - y| / |x| of the image, above which edits were mostly poor"""


def add_invert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any picture file; its centre is cut out and resized")
    parser.add_argument("--model", required=True, help="diffusers folder, hub id, or 'shapes' for the embedded one")
    parser.add_argument("--variant", help="of the model's weight files, e.g. fp16")
    parser.add_argument("--prompt", required=True, help="what the picture shows")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--steps", type=int, default=50, help="diffusion steps of the whole schedule")
    parser.add_argument("--strength", type=float, default=0.8, help="share of the schedule that is gone through")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of classifier-free guidance")
    parser.add_argument("--mix-weight", type=float, default=0.93, help="EDICT's p")
    parser.add_argument("--arithmetic", choices=("exact", "exact64"), default="exact", help="integers of 32 or 64 bits")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--width", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the networks")
    parser.add_argument("--out", type=Path, required=True, metavar="STATE", help="folder for the state and pictures")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state", type=Path, metavar="STATE", help="folder that invert wrote")
    parser.add_argument("--prompt", help="(default: the inverted one, which gives the picture back)")
    parser.add_argument("--negative-prompt", help="(default: the inverted one)")
    parser.add_argument("--guidance-scale", type=float, help="(default: the inverted one)")
    parser.add_argument("--model", help="where the same model lies now (default: where it was)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    parser.add_argument("--out", type=Path, metavar="PNG", help=f"(default: {SAME} or {EDITED} in STATE)")


def invert(args: argparse.Namespace, load: Load) -> int:
    """Takes a picture to its noise; writes both ends' states, what belongs to them, and pictures."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out: expected a new or empty folder, got {str(args.out)!r}, which is taken")
    if not 0 < args.strength <= 1:
        raise ValueError(f"--strength: expected a number in (0, 1], got {args.strength}")
    picture = _open(args.image)
    pipeline = load(args)
    height, width = _size(pipeline, args.height, args.width)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"height": height, "width": width}
    if args.model != EMBEDDED and Path(args.model).expanduser().is_dir():
        settings["model"] = os.path.abspath(Path(args.model).expanduser())
    chain, decode = _chain(pipeline, settings), _decoder(pipeline)
    pixels = _tensor(fit(picture, height, width)).to(pipeline.unet.device)
    with _in_range(_parting(settings, chain)):
        image = chain.state(decode.encode(pixels), end="image")
        noise = chain.inverse_state(image)
    encoded = _decode(decode, image)
    report = {"vae_error": _error(encoded, pixels), **_describe(noise)}
    with new_folder(args.out) as folder:
        noise.save(folder / NOISE)
        image.save(folder / IMAGE)
        write_picture(folder / PICTURE, pixels)
        write_picture(folder / ENCODED, encoded)
        index = {"settings": settings, "image": str(args.image), "weights": fingerprint(pipeline), "report": report}
        write_json(folder / INDEX, index)
    print(f"the noise: standard deviation {report['deviation']:.3g}, |x - y| / |x| = {report['parted']:.2g}")
    if report["deviation"] > LOUD:
        print(
            "that is louder than noise that the model knows, so edits may be poor: try a prompt that describes the "
            "picture better, or a lower --guidance-scale or --strength"
        )
    print(f"the VAE's error: {report['vae_error']:.3g} of 255 (rms); states and pictures in {args.out}")
    return 0


def generate(args: argparse.Namespace, load: Load) -> int:
    """Runs an inverted picture's noise forward; 1 if the same settings did not lead back to the same bits."""
    stored = _read(args.state)
    given = {name: getattr(args, name) for name in ("prompt", "negative_prompt", "guidance_scale")}
    settings = stored.settings | {name: value for name, value in given.items() if value is not None}
    same = settings == stored.settings
    out = args.out or args.state / (SAME if same else EDITED)
    if not out.parent.is_dir() or out.is_dir() or out.suffix != ".png":
        raise ValueError(f"--out: expected a .png file in an existing folder, got {str(out)!r}")
    if out.stem in (Path(PICTURE).stem, Path(ENCODED).stem, Path(INDEX).stem):
        raise ValueError(f"--out: expected another name than those that invert gives, got {str(out)!r}")
    model = {"model": args.model or settings["model"], "variant": settings["variant"], "dtype": settings["dtype"]}
    pipeline = load(argparse.Namespace(**model, device=args.device))
    if fingerprint(pipeline) != stored.weights:
        raise ValueError(
            f"STATE: {str(args.state)!r} was made with other weights than those of {model['model']!r}; pass --model "
            "with the folder of the model that it was made with"
        )
    chain, decode = _chain(pipeline, settings), _decoder(pipeline)
    noise, image = (state.to(pipeline.unet.device) for state in (stored.noise, stored.image))
    with _in_range("Try a lower --guidance-scale, or invert with --arithmetic exact64"):
        reached = chain.forward_state(noise)
    pixels, encoded = _decode(decode, reached), _decode(decode, image)
    equal = reached.equals(image)
    report = {
        "equal": equal,
        "differing": _differing(reached, image),
        "vae_error": stored.report["vae_error"],
        "change": _error(pixels, encoded),
        "parted": _describe(reached)["parted"],
    }
    write_picture(out, pixels)
    write_json(out.with_suffix(".json"), {"settings": settings, "same_settings": same, "report": report})
    print(_said(report, same, out))
    return int(same and not equal)


def _said(report: dict[str, Any], same: bool, out: Path) -> str:
    vae, change = (f"{report[name]:.3g} of 255 (rms)" for name in ("vae_error", "change"))
    if not same:
        said = f"edited: the picture changed by {change}, |x - y| / |x| = {report['parted']:.2g}; {out}"
        if report["parted"] > PARTED:
            said += "\nthe two latents have parted: invert with a lower --mix-weight, less guidance or more --steps"
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


# Pictures


def _open(path: Path) -> Image.Image:
    from ..diffusion.images import open_picture, to_pil

    return to_pil(open_picture(path))[0]


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The largest piece of that shape from a picture's centre, resized (bicubic, antialiased)."""
    from PIL import Image

    scale = min(picture.width / width, picture.height / height)
    columns, rows = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (picture.width - columns) / 2, (picture.height - rows) / 2
    piece = picture.crop((left, top, left + columns, top + rows))
    return piece.resize((width, height), Image.Resampling.BICUBIC)


def _tensor(picture: Image.Image) -> Tensor:
    from ..diffusion.images import open_picture

    return open_picture(picture)


def _error(images: Tensor, truth: Tensor) -> float:
    """Root mean square of what differs between two pictures as they are saved, in units of 1 of 255."""
    images, truth = (pixels.double().clamp(-1, 1) for pixels in (images, truth))
    return float((images - truth).square().mean().sqrt()) * 127.5


# The chain


def _size(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Pixels of the picture. Raises ValueError for what the VAE cannot have."""
    from ..diffusion.pipeline import initial_latents, vae_scale_factor

    factor = vae_scale_factor(pipeline.vae)
    rows, columns = initial_latents(pipeline, height, width).shape[-2:]
    return rows * factor, columns * factor


def _chain(pipeline: Any, settings: dict[str, Any]) -> EDICT:
    from ..diffusion.denoiser import Denoiser
    from ..diffusion.pipeline import encode_prompt
    from ..diffusion.schedule import Schedule
    from ..solvers.edict import EDICT

    cond, uncond, extra = encode_prompt(
        pipeline,
        settings["prompt"],
        settings["negative_prompt"],
        height=settings["height"],
        width=settings["width"],
    )
    denoiser = Denoiser(pipeline.unet, cond, uncond, settings["guidance_scale"], **extra)
    schedule = last_part(Schedule.from_scheduler(pipeline.scheduler, settings["steps"]), settings["strength"])
    return EDICT(denoiser, schedule, settings["mix_weight"], arithmetic=settings["arithmetic"])


def last_part(schedule: Schedule, strength: float) -> Schedule:
    """The share `strength` of a schedule that is nearest to the image, one step at least."""
    first = len(schedule) - max(1, round(strength * len(schedule)))
    parts = {name: getattr(schedule, name)[first:] for name in ("timesteps", "alphas_cumprod", "alphas_cumprod_prev")}
    return replace(schedule, **parts)


@contextmanager
def _in_range(advice: str) -> Iterator[None]:
    """Says what to do on a command line when the lattice overflows."""
    try:
        yield
    except OverflowError as error:
        raise ValueError(f"overflow: {error}. {advice}") from error


def _parting(settings: dict[str, Any], chain: EDICT) -> str:
    """What may be done when an inversion overflows."""
    wider = ", or --arithmetic exact64" if settings["arithmetic"] == "exact" else ""
    return (
        "On the way to noise EDICT multiplies x - y by 1 / mix weight^2 a step, here "
        f"{chain.mix_weight ** (-2 * len(chain.schedule)):.2g} times: try fewer --steps, a lower --strength or "
        f"--guidance-scale, a --mix-weight nearer to 1{wider}"
    )


def _decoder(pipeline: Any) -> Any:
    from ..diffusion.pipeline import Decoder

    return Decoder(pipeline.vae)


def _decode(decode: Any, state: LatticeState) -> Tensor:
    import torch

    with torch.no_grad():
        images: Tensor = decode(state.latents()[0])
    return images


def _describe(state: LatticeState) -> dict[str, float]:
    x, y = (latent.double() for latent in state.latents())
    return {"deviation": float(x.std()), "parted": float((x - y).norm() / x.norm())}


def _differing(state: LatticeState, other: LatticeState) -> float:
    """The share of integers of x and y that differ; 1 for states of other shapes."""
    if state.x.shape != other.x.shape:
        return 1.0
    return float((state.x != other.x).double().mean() + (state.y != other.y).double().mean()) / 2


def fingerprint(pipeline: Any) -> str:
    """Of the weights of a pipeline's networks, in any place: names, shapes, dtypes and the sum of each one's bits."""
    import torch

    integers: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, network in sorted(pipeline.components.items()):
        if isinstance(network, torch.nn.Module):
            for key, weight in sorted(network.state_dict().items()):
                bits = weight.contiguous().view(integers[weight.element_size()]).sum(dtype=torch.int64)
                digest.update(f"{name} {key} {tuple(weight.shape)} {weight.dtype} {int(bits)}".encode())
    return digest.hexdigest()


# What invert wrote


@dataclass(frozen=True)
class _Stored:
    settings: dict[str, Any]
    weights: str
    report: dict[str, float]
    noise: LatticeState
    image: LatticeState


def _read(folder: Path) -> _Stored:
    """Raises ValueError for a folder that invert did not write, or that is damaged."""
    from ..chain.exact.state import LatticeState

    if not (folder / INDEX).is_file():
        raise ValueError(f"STATE: expected a folder that `doodl-fast invert` wrote, got {str(folder)!r}")
    try:
        index = json.loads((folder / INDEX).read_text())
        settings, weights, report = index["settings"], index["weights"], index["report"]
        for name, kind in SETTINGS.items():
            if not isinstance(settings[name], kind):
                raise TypeError(f"{name} is {settings[name]!r}")
        report = {"vae_error": float(report["vae_error"])}
        states = [LatticeState.load(folder / name) for name in (NOISE, IMAGE)]
    except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"STATE: {str(folder)!r} is damaged ({type(error).__name__}: {error}); invert the picture again"
        ) from error
    return _Stored(settings, str(weights), report, *states)
