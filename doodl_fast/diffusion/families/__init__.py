"""One file for each family of diffusers pipelines: Stable Diffusion, SD3, FLUX, PixArt and pixel-space models."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from ..calling import NetworkAdapter
from .animatediff import AnimateDiff
from .audioldm2 import AudioLDM2
from .aura_flow import AuraFlow
from .base import ADAPTERS, Family, Parts, Request, components_of
from .chroma import Chroma
from .cogvideox import CogVideoX
from .deepfloyd_if import DeepFloydIF
from .dit import DiT
from .flow_from_picture import (
    ChromaFromPicture,
    FluxFromPicture,
    QwenImageFromPicture,
    StableDiffusion3FromPicture,
    ZImageFromPicture,
)
from .flux import Flux
from .flux2 import Flux2
from .hunyuan_dit import HunyuanDiT
from .ltx import LTX
from .lumina2 import Lumina2
from .pixart import PixArt
from .pixel import PixelSpace
from .qwen_image import QwenImage
from .sana import Sana
from .sd3 import StableDiffusion3
from .stable_audio import StableAudio
from .stable_diffusion import StableDiffusion
from .wan import Wan
from .z_image import ZImage

__all__ = ["FAMILIES", "Family", "NetworkAdapter", "Parts", "Request", "family_of", "family_of_class"]
logger = logging.getLogger(__name__)
FAMILIES: tuple[Family, ...] = (
    StableDiffusion(),
    StableDiffusion3(),
    Flux(),
    Flux2(),
    QwenImage(),
    Sana(),
    Lumina2(),
    AuraFlow(),
    Chroma(),
    ZImage(),
    DiT(),
    HunyuanDiT(),
    StableDiffusion3FromPicture(),
    FluxFromPicture(),
    QwenImageFromPicture(),
    ChromaFromPicture(),
    ZImageFromPicture(),
    PixArt(),
    PixelSpace(),
    Wan(),
    CogVideoX(),
    LTX(),
    AnimateDiff(),
    AudioLDM2(),
    StableAudio(),
    DeepFloydIF(),
)


def family_of_class(name: str) -> Family | None:
    """Returns the family that serves the pipelines of a class, by the name of the class; None if there is none."""
    return next((family for family in FAMILIES if name in family.pipelines), None)


def family_of(pipe: Any) -> Family:
    """Picks the family of a pipeline by its class, and logs what it picked.

    A class that derives from a known one is served as that one, with a warning.

    Raises:
        TypeError: No family serves the class.
    """
    name = type(pipe).__name__
    for base in type(pipe).__mro__:
        family = family_of_class(base.__name__)
        if family is None:
            continue
        # The Stable Diffusion family says so itself.
        if base is not type(pipe) and not isinstance(family, StableDiffusion):
            warnings.warn(
                f"pipe: {name} is used as a {base.__name__}: anything that its __call__ does besides is not part of "
                "the chain",
                RuntimeWarning,
                stacklevel=3,
            )
        logger.info("%s is served by the family %s", name, type(family).__name__)
        return family
    if components_of(pipe).get("transformer") is not None:
        known = ", ".join(name for family in FAMILIES for name in family.pipelines)
        raise TypeError(f"pipe: from_pipeline does not know {name}; expected one of {known}, or {ADAPTERS}")
    logger.info("%s is treated as a Stable Diffusion pipeline", name)
    return FAMILIES[0]
