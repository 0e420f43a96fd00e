"""The arguments of `gen`, checked before any network is called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chain.chain import Memory
from ..diffusion.hooks import device_of
from ..diffusion.pipeline import to_pil, vae_scale_factor
from .quirks import Quirks

GUIDANCE_TYPES = ("CLIP", "fgvc", "aesthetic", "symmetry")


@dataclass(frozen=True)
class Options:
    """The arguments of `gen`, checked when the object is made.

    Raises:
        ValueError: An argument is out of its range, or two arguments exclude each other.
    """

    cond_prompt: str
    model_guidance_type: str
    model_guidance_dict: Mapping[str, Any]
    save_str: str | None
    grad_scale: float
    sd_guidance_scale: float
    use_cutouts: bool
    num_cuts: int
    cut_power: float
    latent_seed: int | None
    seed: int
    steps: int
    mix_weight: float
    null_prompt: str
    single_variable: bool
    latent_traversal: bool
    num_traversal_steps: int
    save_interval: int
    one_step_baseline: bool
    tied_latents: bool
    use_momentum: bool
    use_nesterov: bool
    renormalize_latents: bool
    optimize_first_edict_image_only: bool
    opt_t: int | None
    perturb_grad_scale: float
    clip_grad_val: float | None
    source_im: Any
    pipeline: Any
    quirks: Quirks
    folder: str | Path
    size: int
    memory: Memory
    progress: bool

    def __post_init__(self) -> None:
        for name, least in (("num_traversal_steps", 1), ("save_interval", 1), ("opt_t", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
        factor = vae_scale_factor(self.pipeline.vae)
        if self.size < factor or self.size % factor:
            raise ValueError(
                f"size: expected a positive multiple of {factor} (the VAE's scale factor), got {self.size!r}"
            )
        if not math.isfinite(self.grad_scale):
            raise ValueError(f"grad_scale: expected a finite number, got {self.grad_scale!r}")
        if self.model_guidance_type not in GUIDANCE_TYPES and self.grad_scale:
            known = ", ".join(map(repr, GUIDANCE_TYPES))
            raise ValueError(f"model_guidance_type: expected one of {known}, got {self.model_guidance_type!r}")
        if self.clip_grad_val is not None and not self.clip_grad_val > 0:
            raise ValueError(f"clip_grad_val: expected a positive number, or None, got {self.clip_grad_val!r}")
        if not self.perturb_grad_scale >= 0:
            raise ValueError(f"perturb_grad_scale: expected a number of at least 0, got {self.perturb_grad_scale!r}")
        self._check_modes()

    def _check_modes(self) -> None:
        if self.latent_traversal and self.single_variable:
            raise ValueError(
                "single_variable: expected latent_traversal=False with it, got True; the steps of a single variable "
                "cannot be undone, so leave single_variable out to optimise latents"
            )
        if self.latent_traversal and self.one_step_baseline and not self.quirks.ignored_one_step_baseline:
            raise ValueError(
                "one_step_baseline: expected latent_traversal=False with it, got True; it has no "
                "effect on latent traversal"
            )
        sampled_from_noise = not self.latent_traversal and self.source_im is None
        if sampled_from_noise and self.opt_t is not None and not self.quirks.ignored_opt_t:
            raise ValueError(
                "opt_t: expected latent_traversal=True or source_im with it, got neither; it has no effect without them"
            )

    @property
    def device(self) -> torch.device:
        """The device on which the UNet and everything else is computed."""
        return device_of(self.pipeline.unet)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latents, which is the UNet's."""
        dtype: torch.dtype = self.pipeline.unet.dtype
        return dtype

    def save(self, image: Tensor, step: int | None = None) -> list[Path]:
        """Saves a picture into `folder` and returns the list of files written, which is empty without a `save_str`.

        Args:
            image: The picture, of shape (1, 3, H, W), in [-1, 1].
            step: The optimisation step that it shows, which becomes part of the file's name; None for a single picture.
        """
        if not self.save_str:
            return []
        name = self.save_str if step is None else self.save_str.replace(".png", f"_{step}.png")
        file = Path(self.folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        to_pil(image)[0].save(file)
        return [file]
