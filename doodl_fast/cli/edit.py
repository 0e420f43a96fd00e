"""What `doodl-fast invert` and `doodl-fast generate` share: a picture is taken to noise, made again, and edited.

A picture is inverted under a prompt that describes it and generated under another (EDICT, Wallace et al., CVPR 2023,
arXiv 2211.12446). In exact arithmetic the same prompt gives the encoded latents back bit for bit, which is checked, so
all that a reconstruction has lost was lost by the VAE.
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

from . import options, solvers
from .solvers import EDICT, INVERTIBLE

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from ..chain.exact.state import LatticeState
    from ..diffusion.decoder import Decoder
    from ..solvers.base import DiffusionChain

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
    "prompt": (str, type(None)),
    "negative_prompt": (str, type(None)),
    "steps": int,
    "strength": float,
    "guidance_scale": float,
    "solver": str,
    "mix_weight": (float, type(None)),
    "gamma": (float, type(None)),
    "scheme": (str, type(None)),
    "zeta": (float, type(None)),
    "arithmetic": str,
    "height": int,
    "width": int,
    "num_frames": (int, type(None)),
    "option": list,
}
"""The options of `invert` that `generate` must know, and the types that they have in the file."""
OLD_STATES: dict[str, Any] = {
    "solver": EDICT,
    "gamma": None,
    "scheme": None,
    "zeta": None,
    "num_frames": None,
    "option": [],
}
"""Settings of states that were stored before there were these."""
LARGEST_DEVIATION, LARGEST_DIFFERENCE = 1.5, 1.0
"""Edits were mostly poor if the noise had a larger standard deviation, or the image a larger |x - y| / |x|."""


def open_image(path: Path) -> Image.Image:
    """Reads a picture file as an RGB picture of 8 bits per channel."""
    from ..diffusion.images import open_picture, to_pil

    return to_pil(open_picture(path))[0]


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Cuts the largest piece of the wanted shape from a picture's centre, and resizes it (bicubic, antialiased)."""
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
    """The root mean square difference of two pictures as they are saved, in units of 1 of 255."""
    images, truth = (pixels.double().clamp(-1, 1) for pixels in (images, truth))
    return float((images - truth).square().mean().sqrt()) * 127.5


def make_chain(pipeline: Any, settings: dict[str, Any]) -> tuple[DiffusionChain, DiffusionChain]:
    """Makes the exact chain that the settings of an inversion describe, and that of the whole schedule.

    The latter knows the shape of the latents, the decoder and the encoder.
    """
    args = argparse.Namespace(**settings)
    whole = solvers.make_chain(args, pipeline)
    schedule = options.last_part(whole.schedule, settings["strength"])
    own: dict[str, Any] = {"arithmetic": settings["arithmetic"], **solvers.solver_options(args)}
    chain: DiffusionChain = solvers.solver_class(args.solver)(whole.denoiser, schedule, **own)
    return chain, whole


@contextmanager
def in_range(advice: str) -> Iterator[None]:
    """Adds to the error of an overflow what to do about it on a command line."""
    try:
        yield
    except OverflowError as error:
        raise ValueError(f"overflow: {error}. {advice}") from error


def advice(settings: dict[str, Any], chain: DiffusionChain) -> str:
    """Says what may be done when an inversion overflows."""
    wider = ", or --arithmetic exact64" if settings["arithmetic"] == "exact" else ""
    name, steps = settings["solver"], len(chain.schedule)
    cause, remedy = "O-BELM's steps amplify what differs between its two latents", ""
    if name == EDICT:
        growth = settings["mix_weight"] ** (-2 * steps)
        cause = f"EDICT multiplies x - y by 1 / mix weight^2 a step, here {growth:.2g} times"
        remedy = ", a --mix-weight nearer to 1"
    elif name == "bdia":
        growth = settings["gamma"] ** -steps
        cause = f"BDIA divides a latent by gamma in every step, here {growth:.2g} times"
        remedy = ", a --gamma nearer to 1"
    elif name == "rex":
        growth = settings["zeta"] ** -steps
        cause = f"Rex divides a latent by zeta in every step, here {growth:.2g} times, and its two latents part"
        remedy = ", a --zeta nearer to 1"
    return f"On the way to noise {cause}: try fewer --steps, a lower --strength or --guidance-scale{remedy}{wider}"


def picture_of(chain: DiffusionChain, state: LatticeState) -> Tensor:
    """The latents of the picture in a state at the image's end, (1, C, h, w)."""
    return state.latents()[chain.picture_index]


def encoded(decode: Decoder, picture: Tensor) -> Tensor:
    """The latents of a picture (1, 3, H, W), which is a video of one frame for a model of videos."""
    from ..diffusion.video import VideoDecoder

    return decode.encode(picture.unsqueeze(1) if isinstance(decode, VideoDecoder) else picture)


def decoded(decode: Decoder, latents: Tensor) -> Tensor:
    """The picture of latents, without a gradient."""
    import torch

    with torch.no_grad():
        pictures = decode(latents)
    return pictures.flatten(0, 1) if pictures.ndim == 5 else pictures


def describe(chain: DiffusionChain, state: LatticeState) -> dict[str, float]:
    """Measures the two latents x and y of a state.

    Returns:
        "deviation" is the standard deviation of x. "parted" is |x - y| / |x|; at the noise of a solver whose second
        latent starts from zero it is |y| / |x|, as y is 0 there if x alone leads to the picture.
    """
    from ..solvers.single import SingleLatentChain

    x, y = (latent.double() for latent in state.latents())
    apart = y if isinstance(chain, SingleLatentChain) and state.end == "noise" else x - y
    return {"deviation": float(x.std()), "parted": float(apart.norm() / x.norm())}


def differing(state: LatticeState, other: LatticeState) -> float:
    """The share of integers of x and y that differ; 1 for states of other shapes."""
    if state.x.shape != other.x.shape:
        return 1.0
    return float((state.x != other.x).double().mean() + (state.y != other.y).double().mean()) / 2


def fingerprint(pipeline: Any) -> str:
    """A hash of the weights of a pipeline's networks: names, shapes, dtypes and the sum of each one's bits.

    It does not depend on the folder or device in which they lie.
    """
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
    """What the folder of an inversion holds.

    Attributes:
        settings: The options of `invert`, see `SETTINGS`.
        weights: The fingerprint of the networks.
        report: What `invert` measured.
        noise: The state at the noise's end.
        image: The state at the image's end.
    """

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
            settings[name].encode()  # This raises a ValueError for what is no text.
            if "\0" in settings[name]:
                raise ValueError(f"{name} is {settings[name]!r}")
    if settings["dtype"] not in options.DTYPES or settings["arithmetic"] not in ("exact", "exact64"):
        raise ValueError(f"dtype is {settings['dtype']!r}, arithmetic is {settings['arithmetic']!r}")
    if settings["solver"] not in INVERTIBLE:
        raise ValueError(f"solver is {settings['solver']!r}")
    own = set(solvers.SOLVERS[settings["solver"]].options)
    if "scheme" in own and settings["scheme"] not in solvers.SCHEMES:
        raise ValueError(f"scheme is {settings['scheme']!r}")
    for name in ("strength", *sorted(own - {"scheme"})):
        if settings[name] is None or not 0 < settings[name] <= 1:
            raise ValueError(f"{name} is {settings[name]!r}")
    if not all(isinstance(text, str) for text in settings["option"]):
        raise ValueError(f"option is {settings['option']!r}")
    for name in ("height", "width"):
        if not 0 < settings[name] <= options.LARGEST_SIDE:
            raise ValueError(f"{name} is {settings[name]!r}")


def check_shape(stored: Stored, whole: DiffusionChain) -> None:
    """Raises ValueError unless the stored latents have the shape that the model makes of the stored size."""
    expected = tuple(whole.noise(batch=1, device="meta").shape)
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
    """Reads what `doodl-fast invert` wrote. Raises ValueError for another folder, or a damaged one."""
    from ..chain.exact.state import LatticeState

    if not (folder / INDEX).is_file():
        raise ValueError(f"STATE: expected a folder that `doodl-fast invert` wrote, got {str(folder)!r}")
    try:
        index = json.loads((folder / INDEX).read_text())
        settings, weights, report = index["settings"], index["weights"], index["report"]
        settings = {**OLD_STATES, **settings}
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
