"""Classifier guidance through a one-step prediction: the baseline that DOODL is measured against.

Guided diffusion (Dhariwal and Nichol, arXiv 2105.05233) with the loss taken on x0 as predicted from a single network
call, as in CLIP-guided Stable Diffusion and in the DOODL paper's comparison (arXiv 2303.13703).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..chain.arithmetic import power_of_two
from ..chain.chain import Chain
from ..chain.evaluator import Evaluator
from ..diffusion.denoiser import Denoiser
from ..diffusion.guided import unconditional
from ..diffusion.schedule import Schedule
from ..solvers.base import DiffusionChain
from .objective import cotangent_of, decoder_dtype, wide


class OneStepGuidance(Evaluator):
    """A denoiser that is pulled towards a lower loss, for use as a chain's evaluator. It is not differentiable.

    At every call x0 is predicted from x by the unconditional network alone. The picture that is scored is decoded from
    `s x0 + (1 - s) x` with `s = sqrt(1 - alphas_cumprod[t])`, and `scale * s * d loss / d x` is added to the guided
    eps. If the network predicts v or the sample instead of eps, its output is shifted by the equivalent amount.

    Args:
        denoiser: The denoiser of the sampler.
        schedule: The noise levels.
        decode: Latents (B, C, h, w) -> images, differentiable.
        loss: Images -> 0-dim tensor, a mean over pictures. Its gradient is multiplied by B, so that the guidance of a
            picture does not depend on the others in its batch.
        scale: The strength of the guidance.

    Raises:
        TypeError: `denoiser` or `schedule` has the wrong type.
        ValueError: `scale` is not a finite number, or `schedule` has a timestep without signal.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        decode: Callable[[Tensor], Tensor],
        loss: Callable[[Tensor], Tensor],
        scale: float = 1.0,
    ) -> None:
        for name, value, kind in (("denoiser", denoiser, Denoiser), ("schedule", schedule, Schedule)):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale!r}")
        if schedule.is_flow:
            raise ValueError("schedule: expected one with alphas_cumprod, got a flow's, whose step this guidance lacks")
        if 0 in schedule.alphas_cumprod:
            raise ValueError(
                f"schedule: expected a signal at every timestep, got alphas_cumprod of 0 at {schedule.timesteps[0]}, "
                "where the noise prediction that this guidance shifts says nothing of the picture"
            )
        self.denoiser, self.schedule, self.decode, self.loss, self.scale = denoiser, schedule, decode, loss, scale
        self._alphas = dict(zip(schedule.timesteps, schedule.alphas_cumprod, strict=True))
        self._without_prompt: dict[int, Denoiser] = {}  # by batch; kept, as each has CUDA graphs of its own

    def __call__(
        self, x: Tensor, t: Any, tensors: Sequence[Tensor] | None = None, latents_dtype: torch.dtype | None = None
    ) -> Tensor:
        """The guided output of the network.

        Args:
            x: Noisy latents, (B, C, h, w).
            t: A timestep of the schedule.
            tensors: Not used.
            latents_dtype: See `Denoiser`.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            RuntimeError: x requires grad and gradients are enabled.
            ValueError: t is not a timestep of the schedule.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "OneStepGuidance: expected torch.no_grad(), got latents that require grad; its steps are not "
                "differentiable, use the chain itself (doodl_fast.optimize) for gradients"
            )
        if int(t) not in self._alphas:
            raise ValueError(f"t: expected one of the schedule's timesteps, got {int(t)}")
        alpha = self._alphas[int(t)]
        with torch.no_grad():
            output = self.denoiser(x, t, None, latents_dtype)
        shift = self.scale * math.sqrt(1 - alpha) * self.gradient(x, t, latents_dtype)
        prediction = self.schedule.prediction_type
        if prediction == "v_prediction":
            shift = shift / math.sqrt(alpha)
        elif prediction == "sample":
            shift = shift * -math.sqrt((1 - alpha) / alpha)
        return output + shift.to(output)

    def gradient(self, x: Tensor, t: Any, latents_dtype: torch.dtype | None = None) -> Tensor:
        """B times the gradient of the loss with respect to x, through the one-step prediction.

        Args:
            x: Noisy latents, (B, C, h, w).
            t: A timestep of the schedule.
            latents_dtype: See `Denoiser`.

        Returns:
            A tensor of x's shape and dtype.
        """
        alpha = self._alphas[int(t)]
        noise_level = math.sqrt(1 - alpha)
        with torch.enable_grad(), self.denoiser.running():
            leaf = x.detach().clone().requires_grad_()
            output = self._unconditional(x.shape[0])(leaf, t, None, latents_dtype)
            sample = noise_level * self._clean(leaf, output, alpha) + (1 - noise_level) * leaf
            picked = sample.detach().to(decoder_dtype(self.decode, sample.dtype, wide(sample).dtype)).requires_grad_()
            image = self.decode(picked)
            cotangent = cotangent_of(self.loss(image), picked, image.numel())
            if cotangent is None:
                raise ValueError("loss: expected a loss that depends on the images, got one that does not")
            # The network may run in fp16, where the gradient of a mean would vanish.
            power = power_of_two(cotangent)
            (pulled,) = torch.autograd.grad(sample, leaf, (cotangent / power).to(sample.dtype))
        return (wide(pulled) * power * x.shape[0]).to(x.dtype)

    def _clean(self, x: Tensor, output: Tensor, alpha: float) -> Tensor:
        """x0 as predicted from the network's output at the noise level `alpha`, a value of alphas_cumprod."""
        signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
        prediction = self.schedule.prediction_type
        if prediction == "v_prediction":
            return signal * x - noise * output
        return output if prediction == "sample" else (x - noise * output) / signal

    def _unconditional(self, batch: int) -> Denoiser:
        """The denoiser with its unconditional conditions alone, or with its conditional ones if it has no others."""
        own = self.denoiser
        if own.uncond is None:
            return own
        if batch in self._without_prompt:
            return self._without_prompt[batch]

        def first_half(leaf: Tensor) -> Tensor:
            paired = leaf.ndim and leaf.shape[0] not in (1, batch) and leaf.shape[0] in (2, 2 * batch)
            return leaf[: leaf.shape[0] // 2] if paired else leaf

        extras = tree_map_only(Tensor, first_half, unconditional(own.unet_kwargs))
        self._without_prompt[batch] = Denoiser(own.unet, own.uncond, **extras)
        return self._without_prompt[batch]

    # What the chain's engine asks for

    def tensors(self) -> tuple[Tensor, ...]:
        """None: nothing is differentiable."""
        return ()

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        return self.denoiser.compute_dtype(latents_dtype)

    def running(self) -> contextlib.AbstractContextManager[None]:
        return self.denoiser.running()


@torch.no_grad()
def one_step(
    chain: DiffusionChain,
    latents: Tensor | tuple[Tensor, Tensor],
    decode: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Runs a chain once under `OneStepGuidance`.

    Args:
        chain: Its denoiser is guided. EDICT, or a solver that starts from one latent, such as DDIM.
        latents: Noise, (B, C, h, w), or a pair (x, y) of it.
        decode: Latents -> images, differentiable.
        loss: Images -> 0-dim tensor.
        scale: The strength of the guidance.

    Returns:
        The final latents (x, y), each (B, C, h, w); of a solver that starts from one latent, what it returns itself.
    """
    guided = OneStepGuidance(chain.denoiser, chain.schedule, decode, loss, scale)
    plain = Chain(guided, chain.program, state_dtype=chain.state_dtype)
    if getattr(chain, "num_starts", 2) == 2:
        return plain(*((latents, latents) if isinstance(latents, Tensor) else latents))
    x = latents if isinstance(latents, Tensor) else latents[0]
    ends = plain(x, torch.zeros_like(x))
    return (ends[1], ends[0]) if chain.picture_index else ends
