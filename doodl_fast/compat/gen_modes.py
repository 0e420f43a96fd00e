"""The two modes of `gen`: optimising latents (latent traversal), and guided sampling with one variable or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..chain.evaluator import Evaluator
from ..chain.program import Program, invert
from ..diffusion.pipeline import Decoder, to_pil
from ..diffusion.schedule import Schedule
from ..optimization import OneStepGuidance
from ..optimization.loop import descend
from ..optimization.objective import Objective
from ..optimization.progress import Progress
from ..optimization.result import Result, StepInfo
from ..optimization.update import UpdateSettings
from ..solvers.edict import ddim_coefficients
from .conditioning import ChainGuidance, Sampler
from .options import Options
from .start import encode_source
from .updates import ReferenceUpdate

if TYPE_CHECKING:
    from PIL import Image


Pair = tuple[Tensor, Tensor]
LossFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GenResult:
    """What `gen` made.

    Attributes:
        images: The pictures (1, 3, H, W) in [-1, 1] of the final latents: x's, and after an optimisation also y's.
        latents: The optimised latents (x, y) with traversal, else the final ones; each of shape (1, C, h, w).
        losses: The value of each call of the loss whose gradient was taken, in order, with `grad_scale`.
        files: The saved pictures, in order.
        optimization: The result of `doodl_fast.optimize` with traversal and guidance, else None.
    """

    images: tuple[Tensor, ...]
    latents: Pair
    losses: list[float] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    optimization: Result | None = None

    @property
    def image(self) -> Image.Image:
        """The picture of the final latents x."""
        return to_pil(self.images[0])[0]


def traverse(o: Options, sampler: Sampler, decode: Decoder, noise: Tensor | None, loss_fn: LossFn | None) -> GenResult:
    """Optimises the latents of the first timestep, or those of the `opt_t`-th timestep from the end.

    Args:
        o: The arguments of `gen`.
        sampler: Makes the chains.
        decode: The decoder.
        noise: The noise that the run starts from, of shape (1, C, h, w); None to start from the source picture.
        loss_fn: The loss; None to make a picture without guidance.
    """
    begin = 0 if o.opt_t is None else max(len(sampler.schedule) - o.opt_t, 0)
    chain = sampler.chain(sampler.program(begin))
    if noise is None:
        # The reference stops with an error if opt_t is given here. The picture is inverted by what undoes the chain.
        undoing = sampler.inverse_program() if o.opt_t is None else invert(chain.program)
        x, y = source_noise(o, sampler, decode, undoing)
    else:
        x, y = sampler.chain(sampler.program(0, begin))(noise)
    if loss_fn is None:
        if o.tied_latents and begin and noise is not None:
            x = y = 0.5 * (x + y)
        images = tuple(decode(z) for z in chain(x, y))
        return GenResult(images, (x, y), files=o.save(images[0], 0))
    first_only = o.optimize_first_edict_image_only
    settings = UpdateSettings(
        grad_scale=2.0 if first_only and not o.quirks.half_gradient_of_first_image else 1.0,
        momentum=0.9 if o.use_momentum else 0.0,
        nesterov=o.use_nesterov,
        clip_grad_value=o.clip_grad_val,
        tied_latents=o.tied_latents,
        renormalize_latents=o.renormalize_latents,
        perturbation_scale=o.perturb_grad_scale,
    )
    to_noise = noise if o.quirks.renormalized_to_noise else None
    update = ReferenceUpdate(x, y, settings, o.quirks, inverted=noise is None, noise=to_noise)
    files: list[Path] = []

    def save(info: StepInfo) -> None:
        if info.step % o.save_interval == 0 or info.step == o.num_traversal_steps - 1:
            files.extend(o.save(info.images[0], info.step))

    objective = Objective(chain, decode, loss_fn, o.dtype, 1 if first_only else 2)
    result = descend(Progress(update, {}), objective, o.num_traversal_steps, save, o.progress)
    losses = [value for pair in result.pair_losses for value in pair]
    return GenResult(result.images, result.latents, losses, files, result)


def sample(o: Options, sampler: Sampler, decode: Decoder, noise: Tensor | None, loss_fn: LossFn | None) -> GenResult:
    """Samples one picture, guided by the gradient of the loss at every step.

    Arguments are those of `traverse`.
    """
    losses: list[float] = []
    evaluator: Evaluator = sampler.denoiser
    if loss_fn is not None:
        scored = _noting(loss_fn, losses)
        if o.one_step_baseline:
            evaluator = OneStepGuidance(sampler.denoiser, sampler.schedule, decode, scored)
        else:
            evaluator = ChainGuidance(sampler, decode, scored)
    begin = 0
    if noise is None and o.opt_t is not None:
        begin = o.opt_t if o.quirks.skipping_opt_t else max(len(sampler.schedule) - o.opt_t, 0)
    if o.single_variable:
        start = noise
        if start is None:
            encoded = encode_source(o.source_im, o.size, decode, o.dtype, o.quirks)
            start = ddim(sampler.denoiser, sampler.part(begin), encoded, inverse=True)
        x = y = ddim(evaluator, sampler.part(begin), start)
    else:
        undoing = sampler.inverse_program(begin, mixed=not o.quirks.unmixed_inversion)
        start_x, start_y = (noise, noise) if noise is not None else source_noise(o, sampler, decode, undoing)
        x, y = sampler.chain(sampler.program(begin), evaluator)(start_x, start_y)
    image = decode(x)
    return GenResult((image,), (x, y), losses, o.save(image))


def source_noise(o: Options, sampler: Sampler, decode: Decoder, undoing: Program) -> Pair:
    """Returns the latents (x, y) that the program `undoing` makes of the latents of the source picture."""
    return sampler.chain(undoing)(encode_source(o.source_im, o.size, decode, o.dtype, o.quirks))


@torch.no_grad()
def ddim(evaluator: Evaluator, schedule: Schedule | None, latents: Tensor, inverse: bool = False) -> Tensor:
    """Samples by plain DDIM (arXiv 2010.02502) with one variable, in float32 at least.

    Args:
        evaluator: Predicts the noise.
        schedule: The steps; None for no step.
        latents: The latents, of shape (B, C, ...).
        inverse: Whether to invert instead. DDIM's inversion takes the noise before each step for the noise after it,
            so it is not exact.

    Returns:
        The latents after the steps, in the given dtype.
    """
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    step = ops.coupling_inverse if inverse else ops.coupling
    rows: list[Any] = []
    if schedule is not None:
        rows = list(zip(schedule.timesteps, schedule.alphas_cumprod, schedule.alphas_cumprod_prev, strict=True))
    with evaluator.running():
        for t, alpha, alpha_prev in reversed(rows) if inverse else rows:
            a, c, b = ddim_coefficients(alpha, alpha_prev, schedule.prediction_type if schedule else "epsilon")
            noise = evaluator(x, t, None, latents.dtype) if b else None
            x = step(x, x if c else None, noise, a, c, b)
    return x.to(latents.dtype)


def _noting(loss_fn: LossFn, values: list[float]) -> LossFn:
    """Returns a loss that appends its values to a list."""

    def noted(images: Tensor) -> Tensor:
        value = loss_fn(images)
        values.append(float(value.detach()))
        return value

    return noted
