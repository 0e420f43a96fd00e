"""The native backend: C++ kernels for the CPU and CUDA kernels, built by setup.py against torch's stable ABI.

Importing this module compiles and loads nothing: the libraries are looked for when a backend is first chosen. Why a
library is not there is kept, for error messages and for `doodl-fast doctor`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from ..signatures import TABLE
from .registry import Kernel

PACKAGE = Path(__file__).resolve().parents[2]
LIBRARIES = {"cpu": "_native", "cuda": "_native_cuda"}
REPORT = "_native_build.json"
OPS = tuple(signature.name for signature in TABLE)


def build_report() -> dict[str, str]:
    """Returns what setup.py recorded: for each type of device "built", or why its library was not built.

    It is empty if setup.py has not run.
    """
    try:
        report: dict[str, str] = json.loads((PACKAGE / REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return report


@functools.cache
def load(device_type: str) -> str | None:
    """Loads the library of a type of device, once. Returns None, or the reason for which there is none."""
    if device_type not in LIBRARIES:
        return f"there are native kernels for {' and '.join(LIBRARIES)} only"
    if device_type == "cuda":
        why_not_cpu = load("cpu")  # The CPU's library defines the schemas.
        if why_not_cpu is not None:
            return why_not_cpu
    name = LIBRARIES[device_type]
    files = sorted(path for path in PACKAGE.glob(f"{name}.*") if path.suffix in (".so", ".pyd", ".dylib"))
    attempts = []
    for path in files:
        try:
            torch.ops.load_library(str(path))
        except Exception as error:  # A foreign binary may fail in any way, and must not break the package.
            attempts.append(f"{path.name}: {type(error).__name__}: {error}")
            continue
        if device_type == "cpu":
            _register_fakes()
        return None
    if attempts:
        return "the library does not load: " + "; ".join(attempts)
    said = build_report().get(device_type)
    looked = f"no {name}.*.so in {PACKAGE}"
    return f"not built: {said} ({looked})" if said and said != "built" else f"not built: {looked}; install from source"


def why_not(device_type: str) -> str | None:
    """Returns the reason for which this backend cannot compute on a type of device, or None if it can."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return load("cuda") or "torch sees no CUDA device"
    return load(device_type)


def kernels() -> dict[str, Kernel]:
    """Returns the kernels by name. PyTorch's dispatcher chooses between those for the CPU and those for CUDA."""
    namespace: Any = torch.ops.doodl_fast_native
    return {name: getattr(namespace, name).default for name in OPS}


def instruction_set() -> str | None:
    """Returns which CPU kernels run here, "avx2" or "baseline", or None if there are none."""
    if load("cpu") is not None:
        return None
    name: str = torch.ops.doodl_fast_native.instruction_set()
    return name


def _register_fakes() -> None:
    """Registers fake implementations, so that `torch.compile` can trace calls of the native kernels."""
    for name in OPS:
        torch.library.register_fake(f"doodl_fast_native::{name}", _returns_nothing)


def _returns_nothing(*_: Any) -> None:
    """The fake implementation of every kernel: a kernel fills its arguments and returns nothing."""
