"""Which backend computes an op: one registry, asked at every call with the tensors' device.

A backend is a table of kernels, one a name, that fill outputs which the op has allocated. The automatic choice takes
the first backend that works on the device; an explicit choice, by `with backend("triton"):` or the environment variable
`DOODL_FAST_BACKEND`, is used or refused with the reason.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from torch import Tensor

Kernel = Callable[..., None]

NAMES = ("eager", "triton", "native")
AUTO = "auto"
VARIABLE = "DOODL_FAST_BACKEND"
# native before triton: at the size of latents a launch costs more than the arithmetic, and Triton's is the dearer one
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("native", "eager"), "cuda": ("native", "triton", "eager")}
_MODULES = {"triton": ".triton", "native": ".native"}

EAGER: dict[str, Kernel] = {}
"""The reference kernels, entered by the ops' own files."""


class _Entry:
    """One `with backend(name):` that is in force. It is told from others of the same name by its identity."""

    def __init__(self, name: str) -> None:
        self.name = name


_entries: contextvars.ContextVar[tuple[_Entry, ...]] = contextvars.ContextVar("doodl_fast_backend", default=())
"""The choices in force in this context, the innermost last. Another thread, or another asyncio task, has its own."""

_environment = os.environ.get(VARIABLE, "").strip().lower()
_chosen: dict[tuple[str, str], dict[str, Kernel]] = {}


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot serve the tensors' device; the message says why, and what can."""


def eager(kernel: Kernel) -> Kernel:
    """Decorator: enters a reference kernel under its function's name, without a leading underscore."""
    EAGER[kernel.__name__.lstrip("_")] = kernel
    return kernel


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """`with backend("triton"):` computes every op with that backend, or raises `BackendUnavailable` at the first op.

    name: "eager", "triton", "native", or "auto" for the automatic choice. It holds for this thread (or asyncio task)
    and wins over `DOODL_FAST_BACKEND`. A thread that must have the same choice, such as one in which autograd runs a
    backward pass, enters it again: `chosen = choice()` here, `with backend(chosen):` there. Raises ValueError for
    another name.
    """
    _check_name(name, "backend")
    entry = _Entry(name)
    _entries.set((*_entries.get(), entry))
    try:
        yield
    finally:  # only this entry goes, so that blocks may end in any order
        _entries.set(tuple(other for other in _entries.get() if other is not entry))


def choice() -> str:
    """The explicit choice in force, or "auto". Raises ValueError when `DOODL_FAST_BACKEND` names no backend."""
    entries = _entries.get()
    if entries:
        return entries[-1].name
    if _environment:
        _check_name(_environment, VARIABLE)
        return _environment
    return AUTO


def select(op: str, tensor: Tensor) -> Kernel:
    """The kernel that computes `op` on a tensor's device. Raises BackendUnavailable where an explicit choice cannot."""
    device_type = "cpu" if tensor.is_cpu else tensor.device.type
    entries = _entries.get()
    key = (device_type, entries[-1].name if entries else _environment)
    table = _chosen.get(key)
    if table is None:
        table = _chosen[key] = _table(resolve(device_type))
    return table[op]


def resolve(device_type: str) -> str:
    """The name of the backend that serves a device type now. Raises as `select`."""
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
    """Why a backend cannot compute on a device type; None when it can."""
    if name == "eager":
        return None
    reason: str | None = import_module(_MODULES[name], __package__).why_not(device_type)
    return reason


def _table(name: str) -> dict[str, Kernel]:
    if name == "eager":
        return EAGER
    module: Any = import_module(_MODULES[name], __package__)
    table: dict[str, Kernel] = module.kernels()
    return table


def _check_name(name: str, argument: str) -> None:
    if name not in (*NAMES, AUTO):
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, (*NAMES, AUTO)))}, got {name!r}")
