"""Optimizers of ``torch.optim`` and their schedules, made for tensors that an optimisation holds itself."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

OptimizerFactory = Callable[..., torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")
"""Options of ``torch.optim`` that choose how an update is computed and not what it is."""
MIXING = ("LBFGS", "Adafactor", "Muon")
"""Optimizers of ``torch.optim`` whose steps are not those of each number alone."""


class Stepper:
    """An optimizer, with its learning-rate schedule, for tensors of an optimisation.

    Args:
        optimizer: A class or factory that takes a list of tensors or of groups of parameters, or an optimizer whose
            class and options are taken.
        parameters: What it changes.
        scheduler: Makes a schedule of ``torch.optim.lr_scheduler`` of the optimizer; None for none.
        options: Options of the group of parameters, such as ``lr``.

    Raises:
        TypeError: An argument makes no optimizer, or no schedule.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: list[Tensor],
        scheduler: SchedulerFactory | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.optimizer = _made_by(optimizer, parameters, dict(options or {}))
        unknown = sorted(set(options or {}) - {*self.optimizer.defaults, "name"})
        if unknown:  # torch keeps such options and does not say that it never reads them
            raise TypeError(
                f"optimizer: expected options of {type(self.optimizer).__name__} "
                f"({', '.join(self.optimizer.defaults)}), got {', '.join(map(repr, unknown))}"
            )
        # As the optimizer was made, for a schedule changes the learning rate later.
        self.options = _options(self.optimizer)
        self.scheduler = None if scheduler is None else _schedule(scheduler, self.optimizer)

    @property
    def needs_closure(self) -> bool:
        """Whether a step evaluates the loss several times, as that of LBFGS does."""
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    @property
    def mixes_samples(self) -> bool:
        """Whether a step of one number may depend on the gradients of others, so that samples are not independent."""
        plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        return self.needs_closure or plateau or type(self.optimizer).__name__ in MIXING

    @property
    def label(self) -> str:
        """The names of the optimizer and of its schedule."""
        names = [type(self.optimizer).__name__]
        return " with ".join(names if self.scheduler is None else [*names, type(self.scheduler).__name__])

    def step(self, loss: float, closure: Callable[[], Tensor] | None = None) -> None:
        """Takes one step with the gradients that the parameters hold, then one of the schedule.

        Args:
            loss: The loss before the step, which ``ReduceLROnPlateau`` wants.
            closure: Evaluates the loss again and sets the gradients, for optimizers that need it.
        """
        if self.needs_closure:
            with torch.enable_grad():
                self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            self.optimizer.step()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """All that `load` needs, as a tree of tensors and plain values."""
        scheduler = None if self.scheduler is None else _plain(self.scheduler.state_dict())
        return {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_options": self.options,
            "scheduler": scheduler,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned. Raises ValueError if the other run had another one."""
        stored = state["optimizer_options"]
        for name, ours in self.options.items():
            # Versions of PyTorch have different options.
            if name in stored and ours != stored[name]:
                raise ValueError(
                    f"resume: the saved run's optimizer had {name}={stored[name]!r}, got {ours!r}; pass the same "
                    "optimizer= as it did"
                )
        schedule = state.get("scheduler")
        if (self.scheduler is None) != (schedule is None):
            expected = "no scheduler" if schedule is None else "a scheduler"
            raise ValueError(f"resume: the saved run used {expected}; pass the same scheduler= as it did")
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and schedule is not None:
            own = self.scheduler.state_dict()
            self.scheduler.load_state_dict({name: _as(own.get(name), value) for name, value in schedule.items()})


def _made_by(optimizer: Any, parameters: list[Tensor], options: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that a caller's factory, or an optimizer as an example, makes; others are refused."""
    if isinstance(optimizer, torch.optim.Optimizer):
        if optimizer.state:
            warnings.warn(
                f"optimizer: {type(optimizer).__name__} has taken steps already; its class and options are taken, and "
                "not its state",
                RuntimeWarning,
                stacklevel=7,
            )
        group = {name: value for name, value in optimizer.param_groups[0].items() if name in optimizer.defaults}
        made = type(optimizer)
        return _checked(made([{"params": parameters, **options}], **group))  # type: ignore[arg-type]
    if not callable(optimizer):
        raise TypeError(
            "optimizer: expected a factory such as `lambda p: torch.optim.Adam(p, lr=1e-2)`, an optimizer, or None, "
            f"got {type(optimizer).__name__}"
        )
    return _checked(optimizer([{"params": parameters, **options}] if options else parameters))


def _checked(made: Any) -> torch.optim.Optimizer:
    """What a factory returned, if it is an optimizer."""
    if isinstance(made, torch.optim.Optimizer):
        return made
    got = type(made).__name__
    raise TypeError(f"optimizer: expected a factory that returns a torch.optim.Optimizer, got one returning {got}")


def _schedule(factory: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule that a factory makes for an optimizer."""
    kinds = (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if isinstance(factory, kinds) or not callable(factory):
        raise TypeError(
            "scheduler: expected a factory such as `lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50)`, or "
            f"None, got {type(factory).__name__}; optimize makes the optimizers that it schedules itself"
        )
    made = factory(optimizer)
    if not isinstance(made, kinds):
        raise TypeError(f"scheduler: expected a factory that returns an LRScheduler, got one returning {made!r}")
    return made


def _plain(value: Any) -> Any:
    """A schedule's state without what cannot be stored: functions, which its factory brings again."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if not callable(item)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value if not callable(item)]
    return value


def _as(own: Any, stored: Any) -> Any:
    """A stored value in the type that the schedule has it in."""
    if isinstance(own, Counter):
        return Counter(stored)
    return tuple(stored) if isinstance(own, tuple) else stored


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's class and the plain options of its first group of parameters, tuples as lists."""
    options: dict[str, Any] = {"class": type(optimizer).__qualname__}
    for name, value in optimizer.param_groups[0].items():
        value = float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, (bool, int, float, str, tuple)) and name not in IMPLEMENTATIONS:
            options[name] = list(value) if isinstance(value, tuple) else value
    return options
