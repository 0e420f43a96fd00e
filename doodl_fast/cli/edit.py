"""`doodl-fast invert` and `doodl-fast generate`: a picture taken to noise by exact EDICT, made again, and edited.

A picture is inverted under a prompt that describes it and generated under another (EDICT, Wallace et al., CVPR 2023,
arXiv 2211.12446). On the lattice of exact arithmetic the same prompt gives the encoded latents back to the bit, which
is checked; what a reconstruction then still lacks is the VAE's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from ..chain.exact.state import LatticeState
    from ..solvers.edict import EDICT

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


def open_image(path: Path) -> Image.Image:
    """A picture file as an RGB picture of 8 bits a channel."""
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


def as_tensor(picture: Image.Image) -> Tensor:
    """A picture as a tensor (1, 3, H, W) in [-1, 1]."""
    from ..diffusion.images import open_picture

    return open_picture(picture)


def picture_error(images: Tensor, truth: Tensor) -> float:
    """Root mean square of what differs between two pictures as they are saved, in units of 1 of 255."""
    images, truth = (pixels.double().clamp(-1, 1) for pixels in (images, truth))
    return float((images - truth).square().mean().sqrt()) * 127.5


def picture_size(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Pixels of the picture. Raises ValueError for what the VAE cannot have."""
    from ..diffusion.pipeline import initial_latents, vae_scale_factor

    factor = vae_scale_factor(pipeline.vae)
    rows, columns = initial_latents(pipeline, height, width).shape[-2:]
    return rows * factor, columns * factor


def make_chain(pipeline: Any, settings: dict[str, Any]) -> EDICT:
    """The exact chain that the settings of an inversion describe."""
    args = argparse.Namespace(**settings)
    return options.edict(args, pipeline, settings["strength"], arithmetic=settings["arithmetic"])


@contextmanager
def in_range(advice: str) -> Iterator[None]:
    """Says what to do on a command line when the lattice overflows."""
    try:
        yield
    except OverflowError as error:
        raise ValueError(f"overflow: {error}. {advice}") from error


def advice(settings: dict[str, Any], chain: EDICT) -> str:
    """What may be done when an inversion overflows."""
    wider = ", or --arithmetic exact64" if settings["arithmetic"] == "exact" else ""
    return (
        "On the way to noise EDICT multiplies x - y by 1 / mix weight^2 a step, here "
        f"{chain.mix_weight ** (-2 * len(chain.schedule)):.2g} times: try fewer --steps, a lower --strength or "
        f"--guidance-scale, a --mix-weight nearer to 1{wider}"
    )


def make_decoder(pipeline: Any) -> Any:
    """The decoder and encoder of a pipeline's VAE."""
    from ..diffusion.pipeline import Decoder

    return Decoder(pipeline.vae)


def decoded(decode: Any, state: LatticeState) -> Tensor:
    """The picture of a state's first latent."""
    import torch

    with torch.no_grad():
        images: Tensor = decode(state.latents()[0])
    return images


def describe(state: LatticeState) -> dict[str, float]:
    """The standard deviation of x, and |x - y| / |x|."""
    x, y = (latent.double() for latent in state.latents())
    return {"deviation": float(x.std()), "parted": float((x - y).norm() / x.norm())}


def differing(state: LatticeState, other: LatticeState) -> float:
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


@dataclass(frozen=True)
class Stored:
    settings: dict[str, Any]
    weights: str
    report: dict[str, float]
    noise: LatticeState
    image: LatticeState


def check_settings(settings: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError for settings that `doodl-fast invert` did not write."""
    for name, kind in SETTINGS.items():
        if not isinstance(settings[name], kind) or isinstance(settings[name], bool):
            raise TypeError(f"{name} is {settings[name]!r}")
        if isinstance(settings[name], str):
            settings[name].encode()  # a ValueError for what is no text
            if "\0" in settings[name]:
                raise ValueError(f"{name} is {settings[name]!r}")
    if settings["dtype"] not in options.DTYPES or settings["arithmetic"] not in ("exact", "exact64"):
        raise ValueError(f"dtype is {settings['dtype']!r}, arithmetic is {settings['arithmetic']!r}")
    if not 0 < settings["strength"] <= 1:
        raise ValueError(f"strength is {settings['strength']!r}")
    for name in ("height", "width"):
        if not 0 < settings[name] <= options.LARGEST_SIDE:
            raise ValueError(f"{name} is {settings[name]!r}")


def check_shape(stored: Stored, pipeline: Any) -> None:
    """Raises ValueError unless the stored latents have the shape that the model makes of the stored size."""
    from ..diffusion.pipeline import vae_scale_factor

    factor = vae_scale_factor(pipeline.vae)
    sides = (stored.settings["height"] // factor, stored.settings["width"] // factor)
    expected = (1, pipeline.unet.config.in_channels, *sides)
    if tuple(stored.noise.x.shape) != expected:
        raise ValueError(
            f"STATE: expected latents of shape {expected} by its settings, got {tuple(stored.noise.x.shape)}; "
            "invert the picture again"
        )


def _regular(path: Path) -> Path:
    """The path of a regular file. Raises FileNotFoundError, also for a pipe, which could block for ever."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing or no regular file")
    return path


def read_state(folder: Path) -> Stored:
    """What `doodl-fast invert` wrote. Raises ValueError for another folder, or a damaged one."""
    from ..chain.exact.state import LatticeState

    if not (folder / INDEX).is_file():
        raise ValueError(f"STATE: expected a folder that `doodl-fast invert` wrote, got {str(folder)!r}")
    try:
        index = json.loads((folder / INDEX).read_text())
        settings, weights, report = index["settings"], index["weights"], index["report"]
        check_settings(settings)
        report = {"vae_error": float(report["vae_error"])}
        states = [LatticeState.load(_regular(folder / name)) for name in (NOISE, IMAGE)]
        if states[0].x.shape != states[1].x.shape:
            raise ValueError(f"{NOISE} has shape {tuple(states[0].x.shape)}, {IMAGE} {tuple(states[1].x.shape)}")
    except (KeyError, IndexError, TypeError, ValueError, OSError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"STATE: {str(folder)!r} is damaged ({type(error).__name__}: {error}); invert the picture again"
        ) from error
    return Stored(settings, str(weights), report, *states)
