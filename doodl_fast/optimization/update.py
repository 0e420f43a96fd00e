"""The latent update of DOODL: clipped momentum SGD on a pair of latents, tied, perturbed and renormalised.

Wallace et al., arXiv 2303.13703, section 4. The arithmetic is that of `ops.latent_update`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import ops
from ..chain.host_reads import check_later
from .arguments import renamed_arguments
from .optimizers import OptimizerFactory, SchedulerFactory, Stepper

Evaluate = Callable[[list[Tensor]], tuple[float, list[Tensor]]]
"""Latents [x, y] -> the mean loss of their images, and its gradients."""
Project = Callable[[Tensor], Tensor]
LARGEST = torch.finfo(torch.float32).max
LARGEST_DEVIATION = 1e37
"""The largest standard deviation whose noise is finite in float32: normal numbers beyond 30 deviations do not occur."""


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


def projected(project: Project, values: Tensor, name: str) -> Tensor:
    """Calls the function of the option `project`, and checks what it returns.

    Args:
        project: The function.
        values: A tensor of a variable, (B, ...), without a graph.
        name: The variable's name.

    Raises:
        TypeError: It returns no tensor.
        ValueError: It returns a tensor of another shape.
    """
    found = project(values.clone())
    if not isinstance(found, Tensor):
        raise TypeError(f"variables[{name!r}]: expected project to return a tensor, got {type(found).__name__}")
    if found.shape != values.shape:
        raise ValueError(
            f"variables[{name!r}]: expected project to return the shape {tuple(values.shape)}, got {tuple(found.shape)}"
        )
    return found.detach().to(values)


class LatentUpdate:
    """Holds a pair of latents, in float32 at least, and what the next update of them needs.

    Args:
        x: Noise latents, (B, C, ...) floating point.
        y: The other latents, of x's shape, dtype and device.
        settings: How a gradient changes them.
        generator: Draws the perturbation, on its own device: a CPU generator's seed means the same noise everywhere.
        optimizer: Replaces momentum SGD. A factory that takes a list of tensors (one if the latents are tied, or else
            two) and returns a ``torch.optim.Optimizer``, or an optimizer whose class and options are taken. Clipping,
            tying, perturbation and renormalisation stay.
        scheduler: Makes a learning-rate schedule of the optimizer, which is ``torch.optim.SGD`` if there is none.
        options: Options of the optimizer's group of parameters.
        per_sample: Whether each sample is an optimisation of its own, so that it gets the perturbation that it would
            get alone.
        project: A function from latents to the nearest ones that are allowed, which is called after every update, after
            renormalisation.

    Raises:
        TypeError: `optimizer` or `scheduler` is no such factory.
        ValueError: A sample's norm is zero or not finite, so that the latents cannot be renormalised.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        settings: UpdateSettings,
        generator: torch.Generator,
        optimizer: OptimizerFactory | torch.optim.Optimizer | None = None,
        scheduler: SchedulerFactory | None = None,
        options: dict[str, Any] | None = None,
        per_sample: bool = False,
        project: Project | None = None,
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
        self.per_sample, self.project = per_sample, project
        if optimizer is None and (scheduler is not None or options):
            optimizer = self._momentum_sgd
        self.stepper = None if optimizer is None else Stepper(optimizer, self.parameters, scheduler, options)
        if self.stepper is not None and self.stepper.needs_closure:
            _warn_of_unused(settings, type(self.stepper.optimizer).__name__)

    def _momentum_sgd(self, parameters: Any) -> torch.optim.Optimizer:
        """The built-in update as an optimizer, whose learning rate a schedule can change."""
        return torch.optim.SGD(parameters, lr=1.0, momentum=self.settings.momentum, nesterov=self.settings.nesterov)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer that replaces momentum SGD."""
        return None if self.stepper is None else self.stepper.optimizer

    def _tie(self) -> None:
        """Replaces both latents by their mean."""
        mean = 0.5 * (self.latents[0] + self.latents[1])
        self.latents = [mean, mean.clone()]

    @torch.no_grad()
    def step(
        self,
        grad_x: Tensor,
        grad_y: Tensor,
        loss: float = 0.0,
        first: list[Tensor] | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        """Updates the latents once.

        The two images are copies of one another, so the mean of their losses is what is minimised, although the
        gradients are those of the sum.

        Args:
            grad_x: d(loss_x + loss_y) / dx, of the latents' shape.
            grad_y: d(loss_x + loss_y) / dy.
            loss: The mean loss of the current latents, for optimizers and schedules that want it.
            first: The gradients of that mean loss, for optimizers that evaluate the loss several times.
            evaluate: Evaluates it again for them.

        Raises:
            FloatingPointError: The updated latents are not finite.
        """
        dtype = self.latents[0].dtype
        gradients = [gradient.to(dtype) for gradient in (grad_x, grad_y)]
        noise = None
        if self.settings.perturbation_scale:
            shape, where = self.latents[0].shape, self.generator.device
            shape = torch.Size((1, *shape[1:])) if self.per_sample else shape
            noise = torch.randn(shape, generator=self.generator, dtype=torch.float32, device=where)
            noise = _copied_to(noise, self.latents[0]).expand_as(self.latents[0]).contiguous()
        if self.optimizer is None:
            self._descend(gradients, noise)
        else:
            self._delegate(gradients, noise, loss, first, evaluate)
        if self.project is not None:
            self.latents = [projected(self.project, z, "start") for z in self.latents]
        check_later(
            torch.stack([torch.isfinite(z).all() for z in self.latents]),
            lambda finite: None if all(finite) else self._blame(noise),
        )

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

    def _delegate(
        self,
        gradients: list[Tensor],
        noise: Tensor | None,
        loss: float,
        first: list[Tensor] | None,
        evaluate: Evaluate | None,
    ) -> None:
        """The same update with the caller's optimizer in place of momentum SGD."""
        settings = self.settings
        assert self.stepper is not None
        if self.stepper.needs_closure:
            self._step_with_closure(loss, first, evaluate)
        else:
            gradients = [0.5 * settings.grad_scale * gradient for gradient in gradients]
            if settings.tied_latents:
                mean = 0.5 * (gradients[0] + gradients[1])
                gradients = [mean, mean]
            if settings.clip_grad_value is not None:
                gradients = [g.clamp(-settings.clip_grad_value, settings.clip_grad_value) for g in gradients]
            self._set(self.latents, gradients)
            self.stepper.step(loss)
            self.latents = self._moved()
        if noise is not None:
            self.latents = [z + settings.perturbation_scale * noise for z in self.latents]
        if settings.tied_latents:
            self._tie()
        if settings.renormalize_latents:
            factors = [start / norms(z) for z, start in zip(self.latents, self.start_norms, strict=True)]
            self.latents = [z * factor.to(z.dtype) for z, factor in zip(self.latents, factors, strict=True)]

    def _set(self, latents: list[Tensor], gradients: list[Tensor]) -> None:
        """Hands latents and gradients to the optimizer."""
        for parameter, latent, gradient in zip(self.parameters, latents, gradients, strict=False):
            parameter.copy_(latent)
            parameter.grad = gradient.clone()

    def _moved(self) -> list[Tensor]:
        """The latents as the optimizer holds them."""
        moved = [p.detach().clone() for p in self.parameters]
        return moved if len(moved) == 2 else [moved[0], moved[0].clone()]

    def _step_with_closure(self, loss: float, first: list[Tensor] | None, evaluate: Evaluate | None) -> None:
        """A step of an optimizer that evaluates the loss several times. It gets the mean loss and its own gradient."""
        assert self.stepper is not None
        if first is None or evaluate is None:
            raise ValueError(
                f"optimizer: expected one that takes a step from one gradient, got "
                f"{type(self.stepper.optimizer).__name__}, which evaluates the loss several times; use torch.optim.Adam"
            )
        known = [(loss, first)]  # what the loop has computed already

        @torch.no_grad()
        def closure() -> Tensor:
            latents = self._moved()
            value, gradients = known.pop() if known else evaluate(latents)
            gradients = [gradient.to(latents[0]) for gradient in gradients]
            if self.settings.tied_latents:
                gradients = [gradients[0] + gradients[1]]
            self._set(latents, gradients)
            return torch.tensor(value, dtype=torch.float64, device=latents[0].device).to(latents[0].dtype)

        for parameter, latent in zip(self.parameters, self.latents, strict=False):
            parameter.copy_(latent)
        self.stepper.step(loss, closure)
        self.latents = self._moved()

    def state(self) -> dict[str, Any]:
        """All that `load` needs, as a tree of tensors and plain values."""
        return {
            "latents": self.latents,
            "momenta": self.momenta,
            "start_norms": self.start_norms,
            "generator": self.generator.get_state(),
            **(self.stepper.state() if self.stepper else {"optimizer": None, "optimizer_options": None}),
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
        if self.stepper is not None:
            self.stepper.load(state)


def _warn_of_unused(settings: UpdateSettings, optimizer: str) -> None:
    """Says which settings an optimizer with a line search does not get, as it needs the loss's own gradient."""
    unused = {"grad_scale": settings.grad_scale != 1, "clip_grad_value": settings.clip_grad_value is not None}
    names = [name for name, is_set in unused.items() if is_set]
    if names:
        warnings.warn(
            f"optimizer: {optimizer} evaluates the loss several times in a step and gets the mean loss and its own "
            f"gradient, so {' and '.join(names)} has no effect; pass clip_grad_value=None to say that you know",
            RuntimeWarning,
            stacklevel=6,
        )


def _copied_to(noise: Tensor, like: Tensor) -> Tensor:
    """A tensor in the dtype and on the device of another. A copy to a GPU does not wait for the GPU."""
    if like.is_cuda and not noise.is_cuda:
        noise = noise.pin_memory()
    return noise.to(like, non_blocking=like.is_cuda)


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
