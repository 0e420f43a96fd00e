"""How a network is called: as a diffusers UNet, or as any function `(x, t, cond)`."""

from __future__ import annotations

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class NetworkCall:
    """Calls a network as `(x, t, cond, kwargs)`, whatever the names of its own arguments are.

    It can be copied and pickled if the network can: a copy calls the copied network, and compiles it anew.

    Args:
        network: A module, or any callable.
        compiles: Whether it is called through `torch.compile`.
    """

    def __init__(self, network: Callable[..., Any], compiles: bool = False) -> None:
        self.network, self.compiles = network, compiles
        self._style, self._options = _calling_convention(network)
        self._target: Callable[..., Any] | None = None

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """The network's own output.

        Args:
            x: The network's input, (B, C, ...).
            t: The timestep, a 0-dim tensor.
            cond: The condition, or None.
            kwargs: What else the network is given, by name.
        """
        if self._target is None:
            self._target = torch.compile(self.network) if self.compiles else self.network
        if self._style == "positional":
            return self._target(x, t, cond, **kwargs)
        if self._style == "named timestep":
            return self._target(x, timestep=t, encoder_hidden_states=cond, **self._options, **kwargs)
        return self._target(x, t, encoder_hidden_states=cond, **self._options, **kwargs)

    def of(self, network: Callable[..., Any]) -> NetworkCall:
        """Calls another network of the same kind in the same way."""
        other = copy.copy(self)
        other.network = network
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_target": None}


class NetworkAdapter(ABC):
    """A callable `(x, t, cond, **kwargs)` around a module that has to be called in another way.

    A `Denoiser` takes it as its network, and finds the weights in the module.

    Args:
        module: The network.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Any:
        """Calls the module and returns its prediction, in x's shape.

        Args:
            x: The latents (B, C, ...), in the dtype of the module's weights.
            t: The timestep, a 0-dim tensor.
            cond: The condition (B, ...), or None.
            **kwargs: What else the `Denoiser` was given.
        """

    def of(self, module: nn.Module) -> NetworkAdapter:
        """Returns the same adapter around another module of the same kind, a copy with cast weights for instance."""
        other = copy.copy(self)
        other.module = module
        return other


def module_of(network: Callable[..., Any]) -> nn.Module | None:
    """The module behind a network: itself, compiled or wrapped for parallel use, a bound method's, a partial's."""
    while True:
        if isinstance(network, functools.partial):
            network = network.func
        elif isinstance(network, NetworkAdapter):
            network = network.module
        elif isinstance(network, nn.Module):
            inner = getattr(network, "_orig_mod", None)
            if inner is None and isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
                inner = network.module
            if not isinstance(inner, nn.Module):
                return network
            network = inner
        else:
            owner = getattr(network, "__self__", None)
            return owner if isinstance(owner, nn.Module) else None


def _calling_convention(network: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """How a network takes the timestep and the condition, and the options that make it return a tuple.

    This is read from the class, as hooks replace the `forward` of instances.
    """
    target: Any = network
    module = module_of(network)
    direct = isinstance(network, (nn.Module, functools.partial)) or getattr(network, "__name__", "") == "forward"
    if module is not None and direct:
        target = type(module).forward
    try:
        names = inspect.signature(target).parameters
    except (TypeError, ValueError):  # A builtin has no signature.
        return "positional", {}
    if "encoder_hidden_states" not in names:
        return "positional", {}
    options = {"return_dict": False} if "return_dict" in names else {}
    # diffusers' transformers take the timestep third, so it is passed by name where it has one.
    return ("named timestep" if "timestep" in names else "named condition"), options
