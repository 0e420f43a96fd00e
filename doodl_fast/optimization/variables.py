"""The variables of an optimisation besides the starting latents: what they are, and how a gradient changes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..chain.host_reads import check_later
from .losses import name_of
from .optimizers import Stepper
from .update import Project, norms, projected

START, NOISE = "start", "noise"
ALIASES = {"latents": START}
OWN = ("optimizer", "scheduler", "grad_scale", "clip_grad_value", "renormalize", "value", "project")
"""Options of a variable that are ours. All others go to its group of parameters."""
EvaluateOne = Callable[[list[Tensor]], tuple[float, list[Tensor]]]


@dataclass(frozen=True)
class VariableOptions:
    """How one variable is optimised.

    Attributes:
        optimizer: A factory of an optimizer, or an optimizer as an example; None for that of the whole optimisation.
        scheduler: A factory of a learning-rate schedule; None for that of the whole optimisation.
        grad_scale: Multiplies the gradient before it is clipped; None for the default.
        clip_grad_value: Largest magnitude of an entry of the gradient; None for no limit, or the default.
        renormalize: Whether each tensor keeps the norm of every sample; None for the default: noise does.
        value: Where the variable starts; None for what the chain has.
        project: A function from a tensor to the nearest one that is allowed, which is called after every update.
        group: Options of its group of parameters, such as ``lr``.
    """

    optimizer: Any = None
    scheduler: Any = None
    grad_scale: float | None = None
    clip_grad_value: float | None = None
    renormalize: bool | None = None
    value: Any = None
    project: Project | None = None
    group: dict[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> dict[str, Any]:
        """What a resumed run must have in common with the stored one, as JSON can hold it."""
        names = ("grad_scale", "clip_grad_value", "renormalize")
        plain = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.project is not None:
            plain["project"] = name_of(self.project)
        return plain


def parse(variables: Any) -> dict[str, VariableOptions]:
    """The variables that the argument `variables` of `optimize` names.

    Args:
        variables: None for the starting latents alone; a name, a list of names, or a dict of names and options.

    Raises:
        TypeError: It is something else.
        ValueError: It names nothing, or one variable twice.
    """
    if variables is None:
        return {START: VariableOptions()}
    if isinstance(variables, str):
        variables = [variables]
    if isinstance(variables, Sequence) and all(isinstance(name, str) for name in variables):
        variables = {name: {} for name in variables}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise TypeError(
            "variables: expected names, or a dict from names to options such as {'noise': {'lr': 0.1}}, got "
            f"{type(variables).__name__}"
        )
    found: dict[str, VariableOptions] = {}
    for given, options in variables.items():
        name = ALIASES.get(str(given), str(given))
        if name in found:
            raise ValueError(f"variables: expected each variable once, got {name!r} twice ('latents' is another name)")
        found[name] = _options(str(given), options)
    if not found:
        raise ValueError("variables: expected at least one variable, got none; 'start' is the starting latents")
    return found


def _options(name: str, options: Any) -> VariableOptions:
    """The options of one variable, checked as far as they can be without the optimizer."""
    if not isinstance(options, Mapping):
        raise TypeError(
            f"variables[{name!r}]: expected a dict of options such as {{'lr': 0.1}}, got {type(options).__name__}"
        )
    own = {key: options[key] for key in OWN if key in options}
    for key in ("grad_scale", "clip_grad_value"):
        value = own.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"variables[{name!r}]: expected a positive number for {key}, or None, got {value!r}")
    if own.get("renormalize") not in (None, True, False):
        raise TypeError(f"variables[{name!r}]: expected True or False for renormalize, got {own['renormalize']!r}")
    if own.get("project") is not None and not callable(own["project"]):
        raise TypeError(
            f"variables[{name!r}]: expected a function from a tensor to a tensor for project, got {own['project']!r}"
        )
    if name in (START, *ALIASES) and own.get("value") is not None:
        raise ValueError(f"variables[{name!r}]: expected no value, which the argument latents gives")
    return VariableOptions(**own, group={key: value for key, value in options.items() if key not in OWN})


class Variable:
    """One variable: its tensors, in float32 at least, and what their next update needs.

    Args:
        name: Its name.
        tensors: Where it starts. They are copied.
        options: How it is optimised.
        optimizer: The optimizer of the whole optimisation, if there is one; Adam otherwise.
        scheduler: The schedule of the whole optimisation, if there is one.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[Tensor],
        options: VariableOptions,
        optimizer: Any = None,
        scheduler: Any = None,
    ) -> None:
        self.name, self.options = name, options
        wide = [t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in tensors]
        self.parameters = [tensor.requires_grad_() for tensor in wide]
        self.keeps_norms = name == NOISE if options.renormalize is None else options.renormalize
        self._norms = [norms(t.detach()) for t in self.parameters] if self.keeps_norms else []
        factory = options.optimizer or optimizer or torch.optim.Adam
        try:
            self.stepper = Stepper(factory, self.parameters, options.scheduler or scheduler, options.group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"variables[{name!r}]: {error}") from error

    @property
    def tensors(self) -> list[Tensor]:
        """The values, without a graph. A step changes them in place."""
        return [parameter.detach() for parameter in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], loss: float, evaluate: EvaluateOne, kept: Tensor | None = None) -> None:
        """Changes the tensors once.

        Args:
            gradients: Of the mean loss.
            loss: The mean loss.
            evaluate: Other values of this variable -> mean loss and its gradients, for optimizers that need it.
            kept: Of a batch of optimisations (B,), which have ended and keep their values.

        Raises:
            FloatingPointError: The new values are not finite.
        """
        before = [t.clone() for t in self.tensors] if kept is not None else []
        self._set(gradients)
        known = [(loss, list(gradients))]

        @torch.no_grad()
        def closure() -> Tensor:
            value, found = known.pop() if known else evaluate(self.tensors)
            self._set(found)
            return torch.tensor(value, dtype=torch.float64).to(self.parameters[0])

        self.stepper.step(loss, closure)
        for parameter, norm in zip(self.parameters, self._norms, strict=False):
            parameter.mul_((norm / norms(parameter)).to(parameter.dtype))
        if self.options.project is not None:
            for parameter in self.parameters:
                parameter.copy_(projected(self.options.project, parameter.detach(), self.name))
        for parameter, old in zip(self.parameters, before, strict=False):
            assert kept is not None
            parameter.copy_(torch.where(kept.view(-1, *[1] * (old.ndim - 1)), old, parameter))
        finite = [torch.isfinite(parameter).all().to(self.parameters[0].device) for parameter in self.parameters]
        check_later(torch.stack(finite), self._check)

    def _check(self, finite: Sequence[float]) -> None:
        """Raises FloatingPointError unless the new values are finite."""
        if not all(finite):
            raise FloatingPointError(
                f"variables[{self.name!r}]: the updated values hold NaN or Inf; lower its lr, or set its "
                "clip_grad_value"
            )

    def _set(self, gradients: Sequence[Tensor]) -> None:
        """Scales, clips and sets the gradients."""
        clip, scale = self.options.clip_grad_value, self.options.grad_scale
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            gradient = gradient.to(parameter) if scale is None else scale * gradient.to(parameter)
            parameter.grad = gradient.clone() if clip is None else gradient.clamp(-clip, clip)

    def state(self) -> dict[str, Any]:
        """All that `load` needs."""
        return {"tensors": self.tensors, **self.stepper.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned."""
        with torch.no_grad():
            for parameter, stored in zip(self.parameters, state["tensors"], strict=True):
                parameter.copy_(stored)
        self.stepper.load(state)
