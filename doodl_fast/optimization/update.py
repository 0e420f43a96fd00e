"""The latent update of DOODL: clipped momentum SGD on a pair of latents, tied, perturbed and renormalised.

Wallace et al., arXiv 2303.13703, section 4. The arithmetic is that of `ops.latent_update`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import ops
from .arguments import renamed_arguments

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]
LARGEST = torch.finfo(torch.float32).max
LARGEST_DEVIATION = 1e37
"""The largest standard deviation whose noise is finite in float32: normal numbers beyond 30 deviations do not occur."""

IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")
"""Options of ``torch.optim`` that choose how an update is computed and not what it is."""


@dataclass(frozen=True)
class UpdateSettings:
    """How a gradient changes the latents. The defaults are the reference's.

    Args:
        grad_scale: Multiplies the gradient *before* it is clipped. (`learning_rate` is its deprecated name.)
        momentum: As in ``torch.optim.SGD`` without dampening, in [0, 1).
        nesterov: As in ``torch.optim.SGD``.
        clip_grad_value: Largest magnitude of an entry of the scaled gradient; None for no limit.
        tied_latents: Whether x and y take the mean of their gradients and stay equal.
        renormalize_latents: Whether each latent is scaled back, after every update, to the norm that it started with.
        perturbation_scale: Standard deviation of the noise that is added to both latents at every update.

    Raises:
        TypeError: A switch is neither True nor False.
        ValueError: A value is out of its range, or too large for float32.
    """

    grad_scale: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    clip_grad_value: float | None = 1e-3
    tied_latents: bool = True
    renormalize_latents: bool = True
    perturbation_scale: float = 1e-4

    def __post_init__(self) -> None:
        _check_number("grad_scale, formerly learning_rate", self.grad_scale, LARGEST)
        _check_number("perturbation_scale", self.perturbation_scale, LARGEST_DEVIATION)
        for name in ("nesterov", "tied_latents", "renormalize_latents"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        momentum, clip = self.momentum, self.clip_grad_value
        if not isinstance(momentum, (int, float)) or isinstance(momentum, bool) or not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum!r}")
        if clip is not None and (not isinstance(clip, (int, float)) or isinstance(clip, bool) or not clip > 0):
            raise ValueError(f"clip_grad_value: expected a positive number, or None for no limit, got {clip!r}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected momentum > 0 with it, got momentum=0; set momentum=0.9")

    @property
    def learning_rate(self) -> float:
        """The deprecated name of `grad_scale`."""
        warnings.warn(
            "UpdateSettings.learning_rate is now called grad_scale; the old name will go in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.grad_scale

    def as_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)


UpdateSettings.__init__ = renamed_arguments(learning_rate="grad_scale")(UpdateSettings.__init__)  # type: ignore[method-assign]


def _check_number(name: str, value: Any, largest: float) -> None:
    """Raises ValueError unless `value` is a number from 0 to `largest`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= largest:
        raise ValueError(f"{name}: expected a number in [0, {largest:.3g}], got {value!r}")


def norms(latents: Tensor) -> Tensor:
    """Euclidean norm of every sample, (B, 1, ...), in float64 as `ops.latent_update` takes it."""
    return torch.linalg.vector_norm(latents, dim=tuple(range(1, latents.ndim)), keepdim=True, dtype=torch.float64)


class LatentUpdate:
    """Holds a pair of latents, in float32 at least, and what the next update of them needs.

    Args:
        x: Noise latents, (B, C, ...) floating point.
        y: The other latents, of x's shape, dtype and device.
        settings: How a gradient changes them.
        generator: Draws the perturbation, on its own device: a CPU generator's seed means the same noise everywhere.
        optimizer: Replaces momentum SGD. A factory that takes a list of tensors (one if the latents are tied, or else
            two) and returns a ``torch.optim.Optimizer``. Clipping, tying, perturbation and renormalisation stay.

    Raises:
        TypeError: `optimizer` is no factory of an optimizer.
        ValueError: The optimizer needs a closure, or a sample's norm is zero or not finite, so that the latents cannot
            be renormalised.
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
        if settings.renormalize_latents:
            _check_norms(self.start_norms, settings.tied_latents)
        self.momenta = [torch.zeros_like(z) for z in self.latents]
        self.parameters = [z.clone().requires_grad_() for z in self.latents[: 1 if settings.tied_latents else 2]]
        self.optimizer = None if optimizer is None else _made_by(optimizer, self.parameters)
        # As the optimizer was made, for a schedule may change the learning rate later.
        self.optimizer_options = None if self.optimizer is None else _options(self.optimizer)

    def _tie(self) -> None:
        """Replaces both latents by their mean."""
        mean = 0.5 * (self.latents[0] + self.latents[1])
        self.latents = [mean, mean.clone()]

    @torch.no_grad()
    def step(self, grad_x: Tensor, grad_y: Tensor) -> None:
        """Updates the latents once.

        The two images are copies of one another, so the mean of their losses is what is minimised, although the
        gradients are those of the sum.

        Args:
            grad_x: d(loss_x + loss_y) / dx, of the latents' shape.
            grad_y: d(loss_x + loss_y) / dy.

        Raises:
            FloatingPointError: The updated latents are not finite.
        """
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
        if not bool(torch.stack([torch.isfinite(z).all() for z in self.latents]).all()):
            self._blame(noise)

    def _blame(self, noise: Tensor | None) -> NoReturn:
        """Raises FloatingPointError that names what made the update not finite."""
        settings = self.settings
        value: float | str
        if noise is not None and not bool(torch.isfinite(settings.perturbation_scale * noise).all()):
            name, value = "perturbation_scale", settings.perturbation_scale
        elif self.optimizer is not None:
            name, value = "optimizer", type(self.optimizer).__name__
        else:
            name, value = "grad_scale", settings.grad_scale
        raise FloatingPointError(
            f"{name}: the updated latents hold NaN or Inf with {name}={value!r}; lower the step size, or set "
            "clip_grad_value=1e-3"
        )

    def _descend(self, gradients: list[Tensor], noise: Tensor | None) -> None:
        """The update with momentum SGD."""
        settings = self.settings
        latents, momenta = ops.latent_update(
            self.latents,
            self.momenta,
            gradients,
            noise,
            self.start_norms if settings.renormalize_latents else None,
            rate=0.5 * settings.grad_scale,
            clip=settings.clip_grad_value,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            tied=settings.tied_latents,
            sigma=settings.perturbation_scale,
        )
        self.latents, self.momenta = list(latents), list(momenta)

    def _delegate(self, gradients: list[Tensor], noise: Tensor | None) -> None:
        """The same update with the caller's optimizer in place of momentum SGD."""
        settings = self.settings
        gradients = [0.5 * settings.grad_scale * gradient for gradient in gradients]
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
        """Hands latents and gradients to the caller's optimizer and takes the latents back."""
        assert self.optimizer is not None
        for parameter, latent, gradient in zip(self.parameters, self.latents, gradients, strict=False):
            parameter.copy_(latent)
            parameter.grad = gradient.clone()
        self.optimizer.step()
        moved = [p.detach().clone() for p in self.parameters]
        self.latents = moved if len(moved) == 2 else [moved[0], moved[0].clone()]

    def state(self) -> dict[str, Any]:
        """All that `load` needs, as a tree of tensors and plain values."""
        return {
            "latents": self.latents,
            "momenta": self.momenta,
            "start_norms": self.start_norms,
            "generator": self.generator.get_state(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "optimizer_options": self.optimizer_options,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned. Raises ValueError if the other run had another optimizer."""
        device = self.latents[0].device
        for name in ("latents", "momenta", "start_norms"):
            setattr(self, name, [z.to(device) for z in state[name]])
        self.generator.set_state(state["generator"])
        if (self.optimizer is None) != (state["optimizer"] is None):
            expected = "no optimizer" if state["optimizer"] is None else "an optimizer"
            raise ValueError(f"resume: the saved run used {expected}; pass the same optimizer= as it did")
        if self.optimizer is not None and self.optimizer_options is not None:
            stored = state["optimizer_options"]
            for name, ours in self.optimizer_options.items():
                # Versions of PyTorch have different options.
                if name in stored and ours != stored[name]:
                    raise ValueError(
                        f"resume: the saved run's optimizer had {name}={stored[name]!r}, got {ours!r}; pass the same "
                        "optimizer= as it did"
                    )
            self.optimizer.load_state_dict(state["optimizer"])


def _made_by(factory: Any, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer that a caller's factory makes; a factory that cannot work is refused with the remedy."""
    if isinstance(factory, torch.optim.Optimizer):
        name = type(factory).__name__
        raise TypeError(
            f"optimizer: expected a factory such as `lambda p: torch.optim.{name}(p, lr=1e-2)`, got an instance of "
            f"{name}; optimize makes the tensors that it optimises itself"
        )
    if not callable(factory):
        raise TypeError(
            "optimizer: expected a factory such as `lambda p: torch.optim.Adam(p, lr=1e-2)`, or None, got "
            f"{type(factory).__name__}"
        )
    optimizer = factory(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        got = type(optimizer).__name__
        raise TypeError(f"optimizer: expected a factory that returns a torch.optim.Optimizer, got one returning {got}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer: expected one that takes a step from one gradient, got {type(optimizer).__name__}, which needs "
            "a closure to evaluate the loss several times; use torch.optim.Adam or SGD, for instance"
        )
    return optimizer


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's class and the plain options of its first group of parameters, tuples as lists."""
    options: dict[str, Any] = {"class": type(optimizer).__qualname__}
    for name, value in optimizer.param_groups[0].items():
        value = float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, (bool, int, float, str, tuple)) and name not in IMPLEMENTATIONS:
            options[name] = list(value) if isinstance(value, tuple) else value
    return options


def _check_norms(start_norms: list[Tensor], tied: bool) -> None:
    """Raises ValueError, naming the samples, unless all norms are positive and finite."""
    values = torch.stack([norm.flatten() for norm in start_norms]).tolist()
    for name, row in zip("xy", values, strict=True):
        samples = [index for index, norm in enumerate(row) if not 0 < norm < float("inf")]
        if samples:
            what = "the mean of x and y" if tied else name
            raise ValueError(
                f"latents: expected a positive norm of every sample, got {row[samples[0]]} for sample {samples[0]} of "
                f"{what}, which cannot be renormalised; pass noise, or renormalize_latents=False"
            )
