"""`gen`, the reference's one function for everything; docs/gen.md lists its modes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..chain.chain import Memory
from ..diffusion.denoiser import Denoiser
from ..diffusion.pipeline import Decoder, encode_prompt, to_pil, vae_scale_factor
from .conditioning import Sampler, default_pipeline, pipeline_schedule
from .gen_modes import GenResult, LossFn, sample, traverse
from .losses import aesthetic_loss_fn, clip_loss_fn, fgvc_loss_fn, symmetry_loss_fn
from .quirks import Quirks
from .schedule import DEFAULT
from .start import initial_noise, seed_everything

GUIDANCE_TYPES = ("CLIP", "fgvc", "aesthetic", "symmetry")


def gen(
    cond_prompt: str = "a dog",
    model_guidance_type: str = "CLIP",
    model_guidance_dict: Mapping[str, Any] = MappingProxyType({"clip_prompt": "a dog", "clip_viz_paths": None}),
    save_str: str | None = "tmp.png",
    grad_scale: float = 1,
    sd_guidance_scale: float = 7.5,
    use_cutouts: bool = True,
    num_cuts: int = 16,
    cut_power: float = 0.3,
    latent_seed: int | None = None,
    seed: int = 0,
    steps: int = 50,
    mix_weight: float = 0.93,
    null_prompt: str = "",
    single_variable: bool = False,
    latent_traversal: bool = True,
    num_traversal_steps: int = 50,
    save_interval: int = 1,
    one_step_baseline: bool = False,
    tied_latents: bool = True,
    use_momentum: bool = True,
    use_nesterov: bool = False,
    renormalize_latents: bool = True,
    optimize_first_edict_image_only: bool = False,
    opt_t: int | None = None,
    perturb_grad_scale: float = 1e-4,
    clip_grad_val: float | None = 1e-3,
    source_im: Any = None,
    *,
    pipeline: Any = None,
    quirks: Quirks = DEFAULT,
    folder: str | Path = "ims",
    size: int = 512,
    memory: Memory = "checkpoint",
    progress: bool = True,
) -> GenResult:
    """Generates or edits a picture under guidance, as the DOODL reference's `gen` (arXiv 2303.13703), and saves it.

    cond_prompt, null_prompt, sd_guidance_scale: the text, the one to lead away from, classifier-free guidance.
    model_guidance_type: "CLIP", "fgvc", "aesthetic" or "symmetry"; model_guidance_dict: what the loss of that type is
        made from, see docs/gen.md. grad_scale: multiplies the loss; 0: no guidance. use_cutouts, num_cuts, cut_power:
        whether the guide sees random cutouts, how many, how large.
    latent_seed: of the noise (default: seed); seed: of cutouts and perturbation. steps, mix_weight: of the chain.
    source_im: a picture (file or PIL) to edit in place of noise.
    latent_traversal: optimise the latents, num_traversal_steps times; a picture is saved every save_interval steps and
        at the last one. tied_latents, use_momentum, use_nesterov, renormalize_latents, optimize_first_edict_image_only,
        perturb_grad_scale, clip_grad_val: how, see `doodl_fast.UpdateSettings`. opt_t: optimise the latents of the
        opt_t-th timestep from the end.
    latent_traversal=False: sample once, with gradients through the rest of the chain at every step, or through a
        one-step prediction (one_step_baseline); single_variable: by DDIM instead of EDICT.
    save_str: name in folder; with traversal ".png" becomes "_0.png", "_1.png", ... None or "" saves nothing.

    pipeline: a loaded Stable-Diffusion-style pipeline; default: Stable Diffusion 1.4, loaded at the first call. Its
        device and dtype are those of everything. quirks: see `Quirks`. size: of the picture's sides in pixels.
    memory: of the chains, see `doodl_fast.EDICT`. progress: show bars.

    Seeds PyTorch's and Python's global generators. Returns a `GenResult`. Raises TypeError or ValueError, naming the
    argument.
    """
    values = locals()
    if pipeline is None:
        values["pipeline"] = default_pipeline()
    values["use_momentum"] = use_momentum or use_nesterov
    return _run(Options(**values))


@dataclass(frozen=True)
class Options:
    """The arguments of `gen`, checked."""

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
                "single_variable: expected latent_traversal=False with it: one variable cannot be undone, so its chain "
                "has no gradient at constant memory; leave it out to optimise latents"
            )
        if self.latent_traversal and self.one_step_baseline and not self.quirks.ignored_one_step_baseline:
            raise ValueError(
                "one_step_baseline: expected latent_traversal=False with it, which it has no effect without"
            )
        sampled_from_noise = not self.latent_traversal and self.source_im is None
        if sampled_from_noise and self.opt_t is not None and not self.quirks.ignored_opt_t:
            raise ValueError(
                "opt_t: expected latent_traversal=True or source_im with it, which it has no effect without"
            )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.pipeline.unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents."""
        dtype: torch.dtype = self.pipeline.unet.dtype
        return dtype

    def save(self, image: Tensor, step: int | None = None) -> list[Path]:
        """Saves a picture (1, 3, H, W), of an optimisation step or the only one; returns its file, if it has a name."""
        if not self.save_str:
            return []
        name = self.save_str if step is None else self.save_str.replace(".png", f"_{step}.png")
        file = Path(self.folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        to_pil(image)[0].save(file)
        return [file]


@torch.no_grad()
def _run(o: Options) -> GenResult:
    pipeline = o.pipeline
    noise = None
    if o.source_im is None:
        side = o.size // vae_scale_factor(pipeline.vae)
        shape = (1, pipeline.unet.config.in_channels, side, side)
        noise = initial_noise(shape, o.seed if o.latent_seed is None else o.latent_seed, o.device, o.dtype)
    seed_everything(o.seed)
    cond, uncond, extra = encode_prompt(pipeline, o.cond_prompt, o.null_prompt, height=o.size, width=o.size)
    loss_fn = _loss(o) if o.grad_scale else None
    denoiser = Denoiser(pipeline.unet, cond, uncond, o.sd_guidance_scale, **extra)
    schedule = pipeline_schedule(pipeline, o.steps, o.quirks)
    sampler = Sampler(denoiser, schedule, o.steps, o.mix_weight, o.quirks, o.memory)
    return (traverse if o.latent_traversal else sample)(o, sampler, Decoder(pipeline.vae), noise, loss_fn)


def _loss(o: Options) -> LossFn:
    """The loss that the options name, times grad_scale."""
    given, kind = o.model_guidance_dict, o.model_guidance_type
    if kind == "symmetry":
        return symmetry_loss_fn(given.get("symmetry_type", "horizontal"), o.grad_scale)
    common: dict[str, Any] = {
        "use_cutouts": o.use_cutouts,
        "num_cuts": o.num_cuts,
        "cut_power": o.cut_power,
        "grad_scale": o.grad_scale,
        "device": o.device,
        "dtype": o.dtype,
        "quirks": o.quirks,
    }
    if kind == "fgvc":
        return fgvc_loss_fn(given.get("dataset"), given.get("class", 0), model=given.get("model"), **common)
    common["clip_models"] = given.get("clip_models")
    if kind == "aesthetic":
        return aesthetic_loss_fn(
            given.get("aesthetic_target"),
            clip_model_str=given.get("clip_model_str", "vit_l_14"),
            weights=given.get("weights", (1, 1)),
            heads=given.get("aesthetic_heads"),
            **common,
        )
    return clip_loss_fn(
        given.get("clip_prompt"),
        given.get("clip_viz_paths"),
        clip_model_str=given.get("clip_model_str", "vit_g_14"),
        weights=(1,) if o.quirks.ignored_clip_weights else given.get("weights", (1,)),
        **common,
    )
