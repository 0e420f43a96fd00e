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
    """Generates or edits a picture under guidance as the DOODL reference's `gen` does (arXiv 2303.13703), and saves it.

    PyTorch's and Python's global random generators are seeded.

    Args:
        cond_prompt: The prompt.
        model_guidance_type: The loss: "CLIP", "fgvc", "aesthetic" or "symmetry".
        model_guidance_dict: What the loss is made from; docs/gen.md lists the entries of each type.
        save_str: The name of the picture's file in `folder`. With `latent_traversal`, ".png" becomes "_0.png", "_1.png"
            and so on. None or "" saves nothing.
        grad_scale: A factor of the loss; 0 switches guidance off.
        sd_guidance_scale: The scale of classifier-free guidance.
        use_cutouts: Whether the guide sees random cutouts of the picture.
        num_cuts: The number of cutouts.
        cut_power: The exponent of their random sizes.
        latent_seed: The seed of the noise; `seed` by default.
        seed: The seed of cutouts and perturbation.
        steps: The number of sampling steps.
        mix_weight: EDICT's mixing weight.
        null_prompt: The negative prompt.
        single_variable: Samples by DDIM with one latent in place of EDICT's two.
        latent_traversal: Whether latents are optimised. If not, sampling is guided at each step by gradients.
        num_traversal_steps: The number of optimisation steps.
        save_interval: A picture is saved at each multiple of this number of steps, and at the last step.
        one_step_baseline: Without `latent_traversal`, the gradient goes through a one-step prediction of the picture
            instead of the rest of the chain.
        tied_latents: See `doodl_fast.UpdateSettings`, as for the next six arguments.
        use_momentum: Whether the momentum is 0.9 or 0.
        use_nesterov: Whether the momentum is Nesterov's, which implies `use_momentum`.
        renormalize_latents: Whether latents are scaled back to their starting norm.
        optimize_first_edict_image_only: Whether only the picture of the first latent is scored.
        opt_t: Optimises the latents of the opt_t-th timestep from the end.
        perturb_grad_scale: The standard deviation of the noise that is added after each update.
        clip_grad_val: The limit that each entry of the gradient is clipped to; None for no limit.
        source_im: A picture (a file or a PIL picture) that is edited.
        pipeline: A loaded pipeline of Stable Diffusion's kind, whose device and dtype are used. By default Stable
            Diffusion 1.4 is loaded at the first call.
        quirks: Which peculiarities of the reference are reproduced.
        folder: The folder of the pictures.
        size: The side of the picture in pixels.
        memory: What the chains keep for their gradients, see `doodl_fast.EDICT`.
        progress: Whether to show progress bars.

    Returns:
        The pictures, latents and losses.

    Raises:
        TypeError: An argument has the wrong type; the error names it.
        ValueError: An argument is out of range, or two exclude each other; the error names them.
    """
    values = locals()
    if pipeline is None:
        values["pipeline"] = default_pipeline()
    values["use_momentum"] = use_momentum or use_nesterov
    return _run(Options(**values))


@torch.no_grad()
def _run(o: Options) -> GenResult:
    """Makes noise, loss and chain from the checked options, and runs the mode that they ask for."""
    pipeline = o.pipeline
    noise = None
    if o.source_im is None:
        side = o.size // vae_scale_factor(pipeline.vae)
        shape = (1, pipeline.unet.config.in_channels, side, side)
        noise = initial_noise(shape, o.seed if o.latent_seed is None else o.latent_seed, o.device, o.dtype)
    seed_everything(o.seed)
    cond, uncond, extra = encode_prompt(pipeline, o.cond_prompt, o.null_prompt, height=o.size, width=o.size)
    loss_fn = _loss(o) if o.grad_scale else None
    denoiser = Denoiser(pipeline.unet, cond, uncond, o.sd_guidance_scale, guide_below_one=True, **extra)
    schedule = pipeline_schedule(pipeline, o.steps, o.quirks)
    sampler = Sampler(denoiser, schedule, o.steps, o.mix_weight, o.quirks, o.memory)
    return (traverse if o.latent_traversal else sample)(o, sampler, Decoder(pipeline.vae), noise, loss_fn)


def _loss(o: Options) -> LossFn:
    """Returns the loss that the options name, multiplied by `grad_scale`."""
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
