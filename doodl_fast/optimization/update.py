"""The latent update of DOODL: clipped momentum SGD on a pair of latents, tied, perturbed and renormalised.

Wallace et al., arXiv 2303.13703, section 4. The arithmetic is that of `ops.latent_update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class UpdateSettings:
    """How a gradient changes the latents; the defaults are the reference's.

    learning_rate: multiplies the gradient *before* it is clipped (the reference's ``grad_scale``).
    momentum, nesterov: as in ``torch.optim.SGD`` without dampening.
    clip_grad_value: largest magnitude of a gradient's element; None for no limit.
    tied_latents: both members take the mean of their gradients, and stay equal.
    renormalize_latents: after every step each latent is scaled back to the norm that it started with.
    perturbation_scale: standard deviation of the noise added to both members at every step.
    """

    learning_rate: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    clip_grad_value: float | None = 1e-3
    tied_latents: bool = True
    renormalize_latents: bool = True
    perturbation_scale: float = 1e-4

    def __post_init__(self) -> None:
        for name, low, high in (
            ("learning_rate", 0, math.inf),
            ("perturbation_scale", 0, math.inf),
            ("momentum", 0, 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value < high:
                raise ValueError(f"{name}: expected a number in [{low}, {high}), got {value!r}")
        clip = self.clip_grad_value
        if clip is not None and (not isinstance(clip, (int, float)) or isinstance(clip, bool) or not clip > 0):
            raise ValueError(f"clip_grad_value: expected a positive number, or None for no limit, got {clip!r}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected momentum > 0 with it, got momentum=0; set momentum=0.9")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def norms(latents: Tensor) -> Tensor:
    """Euclidean norm of every sample, in float64 as `ops.latent_update` takes it: (B, 1, ...)."""
    return torch.linalg.vector_norm(latents, dim=tuple(range(1, latents.ndim)), keepdim=True, dtype=torch.float64)


class LatentUpdate:
    """Holds a pair of latents (in float32 at least) and what a step needs to remember.

    ``step(grad_x, grad_y)`` takes the gradients of the *sum* of both members' losses; since the two images are copies
    of one another, their mean is what is descended. ``optimizer`` replaces momentum SGD: a factory that takes a list
    of tensors (one when tied, else two) and returns any ``torch.optim.Optimizer``; clipping, tying, perturbation and
    renormalisation stay. The perturbation is drawn where the generator is: on the CPU a seed means the same for all.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        settings: UpdateSettings,
        generator: torch.Generator,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.settings = settings
        self.generator = generator
        self.latents = [x.detach().to(dtype, copy=True), y.detach().to(dtype, copy=True)]
        if settings.tied_latents:
            self._tie()
        self.start_norms = [norms(z) for z in self.latents]
        self.momenta = [torch.zeros_like(z) for z in self.latents]
        self.parameters = [z.clone().requires_grad_() for z in self.latents[: 1 if settings.tied_latents else 2]]
        self.optimizer = optimizer(self.parameters) if optimizer is not None else None
        if optimizer is not None and not isinstance(self.optimizer, torch.optim.Optimizer):
            got = type(self.optimizer).__name__
            raise TypeError(
                f"optimizer: expected a factory that returns a torch.optim.Optimizer, got one returning {got}"
            )

    def _tie(self) -> None:
        mean = 0.5 * (self.latents[0] + self.latents[1])
        self.latents = [mean, mean.clone()]

    @torch.no_grad()
    def step(self, grad_x: Tensor, grad_y: Tensor) -> None:
        """One update from d(loss_x + loss_y)/dx and /dy, each of the latents' shape."""
        dtype = self.latents[0].dtype
        gradients = [gradient.to(dtype) for gradient in (grad_x, grad_y)]
        noise = None
        if self.settings.perturbation_scale:
            shape, where = self.latents[0].shape, self.generator.device
            noise = torch.randn(shape, generator=self.generator, dtype=torch.float32, device=where)
            noise = noise.to(self.latents[0])
        if self.optimizer is None:
            self._descend(gradients, noise)
        else:
            self._delegate(gradients, noise)

    def _descend(self, gradients: list[Tensor], noise: Tensor | None) -> None:
        settings = self.settings
        latents, momenta = ops.latent_update(
            self.latents,
            self.momenta,
            gradients,
            noise,
            self.start_norms if settings.renormalize_latents else None,
            rate=0.5 * settings.learning_rate,
            clip=settings.clip_grad_value,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            tied=settings.tied_latents,
            sigma=settings.perturbation_scale,
        )
        self.latents, self.momenta = list(latents), list(momenta)

    def _delegate(self, gradients: list[Tensor], noise: Tensor | None) -> None:
        """The same around the caller's optimizer."""
        settings = self.settings
        gradients = [0.5 * settings.learning_rate * gradient for gradient in gradients]
        if settings.tied_latents:
            mean = 0.5 * (gradients[0] + gradients[1])
            gradients = [mean, mean]
        if settings.clip_grad_value is not None:
            gradients = [g.clamp(-settings.clip_grad_value, settings.clip_grad_value) for g in gradients]
        self._step_optimizer(gradients)
        if noise is not None:
            self.latents = [z + settings.perturbation_scale * noise for z in self.latents]
        if settings.tied_latents:
            self._tie()
        if settings.renormalize_latents:
            factors = [start / norms(z) for z, start in zip(self.latents, self.start_norms, strict=True)]
            self.latents = [z * factor.to(z.dtype) for z, factor in zip(self.latents, factors, strict=True)]

    def _step_optimizer(self, gradients: list[Tensor]) -> None:
        assert self.optimizer is not None
        for parameter, latent, gradient in zip(self.parameters, self.latents, gradients, strict=False):
            parameter.copy_(latent)
            parameter.grad = gradient.clone()
        self.optimizer.step()
        moved = [p.detach().clone() for p in self.parameters]
        self.latents = moved if len(moved) == 2 else [moved[0], moved[0].clone()]

    def state(self) -> dict[str, Any]:
        """All that a later ``load`` needs, as a tree of tensors and plain values."""
        return {
            "latents": self.latents,
            "momenta": self.momenta,
            "start_norms": self.start_norms,
            "generator": self.generator.get_state(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        device = self.latents[0].device
        for name in ("latents", "momenta", "start_norms"):
            setattr(self, name, [z.to(device) for z in state[name]])
        self.generator.set_state(state["generator"])
        if (self.optimizer is None) != (state["optimizer"] is None):
            expected = "no optimizer" if state["optimizer"] is None else "an optimizer"
            raise ValueError(f"resume: the saved run used {expected}; pass the same optimizer= as it did")
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
