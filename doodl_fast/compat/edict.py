"""The public names of EDICT's module `edict_functions`: `from doodl_fast.compat.edict import coupled_stablediffusion`.

EDICT: Wallace, Gokul and Naik, CVPR 2023, arXiv 2211.12446, github.com/salesforce/EDICT. Some ten repositories have a
copy of that module. It loads its networks when it is imported; here they are given as `pipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..chain.program import Program
from ..diffusion.denoiser import Denoiser
from ..diffusion.hooks import device_of
from ..diffusion.images import read_upright, to_pil
from ..diffusion.pipeline import Decoder, encode_prompt, vae_scale_factor
from ..diffusion.schedule import Schedule
from ..solvers.edict import edict_program
from .conditioning import Sampler, default_pipeline, pipeline_schedule
from .gen_modes import Pair, ddim
from .quirks import Quirks
from .schedule import DEFAULT
from .start import composed_with_white

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "EDICT_editing",
    "center_crop",
    "coupled_stablediffusion",
    "im_to_np",
    "load_im_into_format_from_path",
    "recon_test",
]
SIDE = 64
"""Sizes of pictures are cut down to multiples of this number of pixels."""


@torch.no_grad()
def coupled_stablediffusion(
    prompt: str = "",
    prompt_edit: None = None,
    null_prompt: str = "",
    prompt_edit_token_weights: Sequence[Any] = (),
    prompt_edit_tokens_start: float = 0.0,
    prompt_edit_tokens_end: float = 1.0,
    prompt_edit_spatial_start: float = 0.0,
    prompt_edit_spatial_end: float = 1.0,
    guidance_scale: float = 7.0,
    steps: int = 50,
    seed: int | None = 1,
    width: int = 512,
    height: int = 512,
    init_image: Any = None,
    init_image_strength: float = 1.0,
    run_baseline: bool = False,
    use_lms: bool = False,
    leapfrog_steps: bool = True,
    reverse: bool = False,
    return_latents: bool = False,
    fixed_starting_latent: Tensor | Sequence[Tensor] | None = None,
    beta_schedule: str = "scaled_linear",
    mix_weight: float = 0.93,
    *,
    pipeline: Any = None,
    quirks: Quirks = DEFAULT,
) -> Any:
    """Generates a picture with EDICT's two latents, or inverts one, as the function of this name in EDICT's code does.

    The latents are float64, whatever the dtype of the networks, and the networks are called once for both halves of
    guidance. Prompt-to-Prompt (`prompt_edit` and what belongs to it) is refused.

    Args:
        prompt: The prompt.
        prompt_edit: Must be None.
        null_prompt: The negative prompt.
        prompt_edit_token_weights: Must be empty.
        prompt_edit_tokens_start: Has no effect without `prompt_edit`, like the next three.
        prompt_edit_tokens_end: See above.
        prompt_edit_spatial_start: See above.
        prompt_edit_spatial_end: See above.
        guidance_scale: The scale of classifier-free guidance.
        steps: The number of steps of the whole schedule. With 0 the picture is only encoded, or noise only decoded.
        seed: Of the noise, and of the sample that the VAE draws when it encodes a picture. None for a random one.
        width: Of the picture in pixels, cut down to a multiple of 64.
        height: Of the picture in pixels, cut down to a multiple of 64.
        init_image: With `reverse`, what is inverted: a PIL picture, latents (1, C, h, w), or a list of two of either.
        init_image_strength: The part of the schedule, from the picture's end, that is run. A picture that is
            generated from noise always takes the whole schedule.
        run_baseline: Plain DDIM with one latent, whose inversion is not exact. The second latent is left as it was.
        use_lms: Must be False.
        leapfrog_steps: Whether the two latents take turns in going first.
        reverse: Whether to invert `init_image`.
        return_latents: Whether latents are returned and not pictures.
        fixed_starting_latent: Latents (1, C, h, w), or two of them, to start from, for instance what `reverse` gave.
        beta_schedule: Must be "scaled_linear".
        mix_weight: EDICT's mixing weight.
        pipeline: A loaded pipeline of Stable Diffusion's kind, whose device and dtype are used. By default Stable
            Diffusion 1.4 is loaded at the first call.
        quirks: Which peculiarities of the reference's schedule are reproduced.

    Returns:
        A list of two PIL pictures. With `reverse` or `return_latents` a list of two latents (1, C, h, w), float64.

    Raises:
        ValueError: An argument is out of range or not supported, or `init_image` and `reverse` do not fit; the error
            names it.

    Example:
        >>> latents = coupled_stablediffusion("a dog", reverse=True, init_image=picture, pipeline=pipe)
        >>> edited, _ = coupled_stablediffusion("a cat", fixed_starting_latent=latents, pipeline=pipe)
    """
    _refuse(prompt_edit, prompt_edit_token_weights, use_lms, beta_schedule)
    if reverse != (init_image is not None):
        raise ValueError(
            f"init_image: expected {'a picture' if reverse else 'None'} with reverse={reverse}, got {init_image!r}; "
            "only an inversion starts from a picture"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= 1000:
        raise ValueError(f"steps: expected an int from 0 to 1000, got {steps!r}")
    if not 0 <= init_image_strength <= 1:
        raise ValueError(f"init_image_strength: expected a number from 0 to 1, got {init_image_strength!r}")
    pipe = default_pipeline() if pipeline is None else pipeline
    run = _Run(pipe, width - width % SIDE, height - height % SIDE, seed, quirks)
    start = init_image if reverse else fixed_starting_latent
    pair = run.pair(start)
    if steps == 0:
        return pair[0] if reverse else to_pil(run.decode(pair[0]))[0]
    cond, uncond, extra = encode_prompt(pipe, prompt, null_prompt, height=run.height, width=run.width)
    denoiser = Denoiser(pipe.unet, cond, uncond, guidance_scale, guide_below_one=True, **extra)
    sampler = Sampler(denoiser, pipeline_schedule(pipe, steps, quirks), steps, mix_weight, quirks)
    begin = 0 if start is None else steps - int(steps * init_image_strength)
    if run_baseline:
        pair = [ddim(denoiser, sampler.part(begin), pair[0], inverse=reverse), pair[1]]
    else:
        pair = list(_couple(sampler, begin, leapfrog_steps, reverse, (pair[0], pair[1])))
    if reverse or return_latents:
        return pair
    return [to_pil(run.decode(latents))[0] for latents in pair]


def EDICT_editing(
    im_path: Any,
    base_prompt: str,
    edit_prompt: str,
    use_p2p: bool = False,
    steps: int = 50,
    mix_weight: float = 0.93,
    init_image_strength: float = 0.8,
    guidance_scale: float = 3,
    run_baseline: bool = False,
    *,
    pipeline: Any = None,
) -> Any:
    """Edits a picture: it is inverted under the prompt that describes it and generated again under another.

    Args:
        im_path: A file, or a PIL picture, which is used as it is.
        base_prompt: A description of the picture.
        edit_prompt: A description of the wanted picture.
        use_p2p: Must be False.
        steps: The number of steps.
        mix_weight: EDICT's mixing weight.
        init_image_strength: The part of the schedule that is inverted. More changes more of the picture.
        guidance_scale: The scale of classifier-free guidance.
        run_baseline: Whether plain DDIM is used instead of EDICT.
        pipeline: A loaded pipeline, see `coupled_stablediffusion`.

    Returns:
        A list of two PIL pictures, edited and nearly equal. With `run_baseline` the second is the picture itself.

    Raises:
        ValueError: An argument is out of range or not supported.
    """
    if use_p2p:
        raise ValueError("use_p2p: expected False, got True; Prompt-to-Prompt is not supported")
    picture = load_im_into_format_from_path(im_path) if isinstance(im_path, (str, Path)) else im_path
    common: dict[str, Any] = {
        "init_image_strength": init_image_strength,
        "steps": steps,
        "mix_weight": mix_weight,
        "guidance_scale": guidance_scale,
        "run_baseline": run_baseline,
        "pipeline": pipeline,
    }
    latents = coupled_stablediffusion(base_prompt, reverse=True, init_image=picture, **common)
    return coupled_stablediffusion(edit_prompt, fixed_starting_latent=latents, **common)


def recon_test(
    im: Any,
    steps: int = 50,
    strength: float = 1.0,
    run_baseline: bool = False,
    back_and_forth: bool = False,
    prompt: str = "",
    guidance_scale: float = 7,
    plot: bool = False,
    mix_weight: float = 1,
    *,
    pipeline: Any = None,
) -> float:
    """Returns the mean squared error of a picture that is inverted and generated again, with pixels in [-1, 1].

    Args:
        im: A file, or a PIL picture of the size 512 x 512.
        steps: The number of steps.
        strength: The part of the schedule that is run.
        run_baseline: Whether plain DDIM is used instead of EDICT.
        back_and_forth: Must be False; `coupled_stablediffusion` has no such argument, in EDICT's code neither.
        prompt: The prompt of both ways.
        guidance_scale: The scale of classifier-free guidance.
        plot: Has no effect, in EDICT's code neither.
        mix_weight: EDICT's mixing weight.
        pipeline: A loaded pipeline, see `coupled_stablediffusion`.

    Raises:
        ValueError: An argument is out of range or not supported.
    """
    if back_and_forth:
        raise ValueError("back_and_forth: expected False, got True; the sampler has no such mode")
    picture = load_im_into_format_from_path(im) if isinstance(im, (str, Path)) else im
    common: dict[str, Any] = {
        "steps": steps,
        "init_image_strength": strength,
        "run_baseline": run_baseline,
        "guidance_scale": guidance_scale,
        "mix_weight": mix_weight,
        "pipeline": pipeline,
    }
    latents = coupled_stablediffusion(prompt, reverse=True, init_image=picture, **common)
    start = latents[0] if run_baseline else latents
    again = coupled_stablediffusion(prompt, fixed_starting_latent=start, **common)[0]
    return float(((im_to_np(picture) - im_to_np(again)) ** 2).mean())


def im_to_np(im: Image.Image) -> Any:
    """Returns the pixels of a picture as a NumPy array (H, W, 3), float64, in [-1, 1]."""
    import numpy as np

    return np.asarray(im).astype(np.float64) / 255.0 * 2.0 - 1.0


def center_crop(im: Image.Image) -> Image.Image:
    """Cuts the largest square from the centre of a picture."""
    side = min(im.size)
    left, top = (im.width - side) / 2, (im.height - side) / 2
    return im.crop((left, top, left + side, top + side))  # type: ignore[arg-type]


def load_im_into_format_from_path(im_path: str | Path) -> Image.Image:
    """Reads a picture file and returns its central square, resized to 512 x 512.

    Raises:
        ValueError: The file is missing or no picture.
    """
    return center_crop(read_upright(im_path, "im_path")).resize((512, 512))


@dataclass
class _Run:
    """The networks, the size and the random numbers of one call.

    Attributes:
        pipeline: A loaded pipeline.
        width: Of the picture in pixels.
        height: Of the picture in pixels.
        seed: Of the random numbers; None for a random one.
        quirks: `signed_alpha` is used where transparent pictures are composed with white.
    """

    pipeline: Any
    width: int
    height: int
    seed: int | None
    quirks: Quirks
    decoder: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self.decoder = Decoder(self.pipeline.vae)
        for name in ("width", "height"):
            if getattr(self, name) < SIDE:
                raise ValueError(f"{name}: expected at least {SIDE} pixels, got {getattr(self, name)}")
        self._generator = torch.Generator(device_of(self.pipeline.unet))
        if self.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.seed)

    def pair(self, start: Any) -> list[Tensor]:
        """Returns the two latents to start from: noise for None, else those of a picture, of latents, or of two."""
        if start is None:
            factor = vae_scale_factor(self.pipeline.vae)
            shape = (1, self.pipeline.unet.config.in_channels, self.height // factor, self.width // factor)
            device = self._generator.device
            start = torch.randn(shape, generator=self._generator, device=device, dtype=torch.float64)
        entries = list(start) if isinstance(start, (list, tuple)) else [start]
        if len(entries) > 2 or not entries:
            raise ValueError(f"init_image, fixed_starting_latent: expected one entry or two, got {len(entries)}")
        latents = [self._latents(entry) for entry in entries]
        return latents if len(latents) == 2 else [latents[0], latents[0].clone()]

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the picture (1, 3, H, W) of latents, in [-1, 1]."""
        return self.decoder(latents.to(torch.promote_types(self.pipeline.vae.dtype, torch.float32)))

    def _latents(self, entry: Any) -> Tensor:
        """Returns latents as they are, or those that the VAE draws for a picture, in float64."""
        device = device_of(self.pipeline.unet)
        if isinstance(entry, Tensor):
            return entry.to(device, torch.float64, copy=True)
        import numpy as np
        from PIL import Image

        if not isinstance(entry, Image.Image):
            raise ValueError(f"init_image: expected a PIL picture or latents, got {type(entry).__name__}")
        resized = entry.resize((self.width, self.height), resample=Image.Resampling.LANCZOS)
        values = np.asarray(resized).astype(np.float64) / 255.0 * 2.0 - 1.0
        if values.ndim < 3:
            values = np.stack([values] * 3, axis=2)
        pixels = composed_with_white(torch.from_numpy(values).permute(2, 0, 1)[None], self.quirks)
        return self.decoder.encode(pixels.to(device), sample=True, generator=self._generator)


def _couple(sampler: Sampler, begin: int, alternate: bool, reverse: bool, pair: Pair) -> Pair:
    """Runs EDICT's couplings from step `begin` to the picture, or back, on two latents.

    Args:
        sampler: Has the denoiser and the schedule.
        begin: The first step, counted from the noise. The order of the two latents is counted from it.
        alternate: Whether the latents take turns in going first. If not, x always does.
        reverse: Whether the couplings are undone.
        pair: The two latents.
    """
    part = sampler.part(begin)
    chain = sampler.chain(coupled_program(part, sampler.mix_weight, alternate) if part is not None else ())
    ends: Pair = chain.inverse(*pair) if reverse else chain(*pair)
    return ends


def coupled_program(schedule: Schedule, mix_weight: float, alternate: bool) -> Program:
    """Returns EDICT's couplings in the order of its public code.

    Args:
        schedule: The noise levels.
        mix_weight: EDICT's mixing weight.
        alternate: Whether x and y take turns in going first, x in the first step. If not, x always does.
    """
    if alternate:
        return edict_program(schedule, mix_weight)
    table = zip(schedule.timesteps, schedule.alphas_cumprod, schedule.alphas_cumprod_prev, strict=True)
    steps = [Schedule((t,), (alpha,), (previous,), schedule.prediction_type) for t, alpha, previous in table]
    return tuple(coupling for step in steps for coupling in edict_program(step, mix_weight))


def _refuse(prompt_edit: Any, weights: Sequence[Any], use_lms: bool, beta_schedule: str) -> None:
    """Raises ValueError for the arguments of EDICT's code that are not supported."""
    if prompt_edit is not None:
        raise ValueError(
            f"prompt_edit: expected None, got {prompt_edit!r}; Prompt-to-Prompt is not supported, because it changes "
            "the attention of the network between calls"
        )
    if len(weights):
        raise ValueError(f"prompt_edit_token_weights: expected none, got {weights!r}; they are not supported")
    if use_lms:
        raise ValueError("use_lms: expected False, got True; linear multistep solvers cannot be inverted as DDIM can")
    if beta_schedule != "scaled_linear":
        raise ValueError(
            f"beta_schedule: expected 'scaled_linear', got {beta_schedule!r}; give a pipeline whose scheduler has "
            "other noise levels"
        )
