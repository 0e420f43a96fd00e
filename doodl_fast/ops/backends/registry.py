"""The registry of backends, which says at every call of an op which backend computes it.

A backend is a table of kernels by the names of the ops. A kernel fills outputs that the op has allocated. The
automatic choice takes the first backend that works on the tensors' device. An explicit choice, by
`with backend("triton"):` or the environment variable `DOODL_FAST_BACKEND`, is used, or refused with the reason. An op
of which the chosen backend has no kernel for the device (the native one has none of layers for CUDA) is computed by the
next backend in the order of the automatic choice.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from torch import Tensor

from ..signatures import Signature

Kernel = Callable[..., None]

NAMES = ("eager", "triton", "native")
AUTO = "auto"
VARIABLE = "DOODL_FAST_BACKEND"
# Native kernels come before Triton's: at the size of latents a launch costs more than the arithmetic, and a launch by
# Triton costs the most.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("native", "eager"), "cuda": ("native", "triton", "eager")}
_MODULES = {"triton": ".triton", "native": ".native"}

EAGER: dict[str, Kernel] = {}
"""The eager kernels by the names of their ops. The files of the ops enter them."""


class _Entry:
    """One `with backend(name):` block that has begun and not ended. Two of the same name are different objects."""

    def __init__(self, name: str) -> None:
        self.name = name


_entries: contextvars.ContextVar[tuple[_Entry, ...]] = contextvars.ContextVar("doodl_fast_backend", default=())
"""The blocks that this context is inside of, the innermost last. Each thread and each asyncio task has its own."""

_environment = os.environ.get(VARIABLE, "").strip().lower()
_chosen: dict[tuple[str, str], dict[str, Kernel]] = {}


class BackendUnavailable(RuntimeError):
    """The explicitly chosen backend cannot compute on the tensors' device. The message says why, and which can."""


def eager(signature: Signature) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Decorator: makes a function the eager kernel of an op.

    Args:
        signature: The op's row in the table of signatures.

    Returns:
        A decorator for a function that takes one named tuple, `signature.kernel_call`, and fills its outputs.
    """

    def enter(function: Callable[[Any], None]) -> Callable[[Any], None]:
        EAGER[signature.name] = signature.kernel(function)
        return function

    return enter


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager: every op inside the block is computed by one backend.

    The choice holds for this thread (or asyncio task) and has precedence over `DOODL_FAST_BACKEND`. A thread that must
    have the same choice, such as one in which autograd runs a backward pass, enters it again: `chosen = choice()` here,
    `with backend(chosen):` there. If the backend cannot compute on a device, the first op there raises
    `BackendUnavailable`.

    Args:
        name: "eager", "triton" or "native"; or "auto" for the automatic choice.

    Raises:
        ValueError: There is no backend of that name.

    Example:
        >>> with ops.backend("eager"):
        ...     x = ops.coupling(x, y, eps, a=0.9, b=-0.1)
    """
    _check_name(name, "backend")
    entry = _Entry(name)
    _entries.set((*_entries.get(), entry))
    try:
        yield
    finally:  # Only this block's own entry is removed, so that blocks may end in any order.
        _entries.set(tuple(other for other in _entries.get() if other is not entry))


def choice() -> str:
    """Returns the name of the backend that is explicitly chosen, or "auto".

    Raises:
        ValueError: The environment variable `DOODL_FAST_BACKEND` names no backend.
    """
    entries = _entries.get()
    if entries:
        return entries[-1].name
    if _environment:
        _check_name(_environment, VARIABLE)
        return _environment
    return AUTO


def select(op: str, tensor: Tensor) -> Kernel:
    """Returns the kernel that computes an op on a tensor's device.

    Args:
        op: The op's name.
        tensor: One of its tensors.

    Raises:
        BackendUnavailable: The explicitly chosen backend cannot compute on that device.
    """
    return kernel("cpu" if tensor.is_cpu else tensor.device.type, op)


def kernel(device_type: str, op: str) -> Kernel:
    """Returns the kernel that computes an op on a type of device, such as "cuda", at present.

    Raises:
        BackendUnavailable: The explicitly chosen backend cannot compute on that device.
    """
    entries = _entries.get()
    key = (device_type, entries[-1].name if entries else _environment)
    table = _chosen.get(key)
    if table is None:
        table = _chosen[key] = _completed(_table(resolve(device_type), device_type), device_type)
    return table[op]


def has_kernel(op: str, tensor: Tensor) -> bool:
    """Returns whether a kernel of its own computes an op on a tensor's device at present, and not eager PyTorch.

    Args:
        op: The op's name.
        tensor: One of its tensors.

    Raises:
        BackendUnavailable: The explicitly chosen backend cannot compute on that device.
    """
    return select(op, tensor) is not EAGER[op]


def resolve(device_type: str) -> str:
    """Returns the name of the backend that computes on a type of device, such as "cuda", at present.

    Raises:
        BackendUnavailable: The explicitly chosen backend cannot compute on that device.
    """
    name = choice()
    if name == AUTO:
        order = PREFERENCE.get(device_type, ("eager",))
        return next(candidate for candidate in order if why_not(candidate, device_type) is None)
    reason = why_not(name, device_type)
    if reason is not None:
        able = [other for other in NAMES if why_not(other, device_type) is None]
        raise BackendUnavailable(
            f"backend {name!r} cannot compute on {device_type!r}: {reason}. Available for {device_type!r}: "
            f"{', '.join(map(repr, able))}; `doodl-fast doctor` says more"
        )
    return name


def why_not(name: str, device_type: str) -> str | None:
    """Returns the reason for which a backend cannot compute on a type of device, or None if it can."""
    if name == "eager":
        return None
    reason: str | None = import_module(_MODULES[name], __package__).why_not(device_type)
    return reason


def _table(name: str, device_type: str) -> dict[str, Kernel]:
    """Returns the kernels that a backend has for a type of device."""
    if name == "eager":
        return EAGER
    module: Any = import_module(_MODULES[name], __package__)
    table: dict[str, Kernel] = module.kernels(device_type)
    return table


def _completed(table: dict[str, Kernel], device_type: str) -> dict[str, Kernel]:
    """Returns a backend's kernels, and for the ops that it has none of those of the next backend that has one."""
    for name in (*PREFERENCE.get(device_type, ()), "eager"):
        if EAGER.keys() <= table.keys():
            break
        if why_not(name, device_type) is None:
            table = {**_table(name, device_type), **table}
    return table


def _check_name(name: str, argument: str) -> None:
    """Raises ValueError, which names the argument, unless a backend has that name."""
    if name not in (*NAMES, AUTO):
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, (*NAMES, AUTO)))}, got {name!r}")
