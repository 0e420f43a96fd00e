"""`gen`, the reference's one function for everything; docs/gen.md lists its modes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..chain.chain import Memory
from ..diffusion.denoiser import Denoiser
from ..diffusion.pipeline import Decoder, encode_prompt, vae_scale_factor
from .conditioning import Sampler, default_pipeline, pipeline_schedule
from .gen_modes import GenResult, LossFn, sample, traverse
from .losses import aesthetic_loss_fn, clip_loss_fn, fgvc_loss_fn, symmetry_loss_fn
from .options import Options
from .quirks import Quirks
from .schedule import DEFAULT
from .start import initial_noise, seed_everything


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
