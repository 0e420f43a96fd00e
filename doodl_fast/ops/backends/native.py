"""The native backend: C++ kernels for the CPU and CUDA kernels, built by setup.py against torch's stable ABI.

Nothing is compiled or loaded at import: the libraries are looked for when a backend is first chosen. What was tried,
and what came of it, is kept for the messages and for `doodl-fast doctor`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from .registry import Kernel

PACKAGE = Path(__file__).resolve().parents[2]
LIBRARIES = {"cpu": "_native", "cuda": "_native_cuda"}
REPORT = "_native_build.json"
OPS = (
    "coupling",
    "coupling_vjp",
    "coupling_mix",
    "coupling_mix_vjp",
    "latent_update",
    "lattice_coupling",
    "lattice_mix",
)


def build_report() -> dict[str, str]:
    """What setup.py wrote down: for each library "built" or why not; empty without an install."""
    try:
        report: dict[str, str] = json.loads((PACKAGE / REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return report


@functools.cache
def load(device_type: str) -> str | None:
    """Loads the library of a device type, once. Returns None, or every attempt and why it failed."""
    if device_type not in LIBRARIES:
        return f"there are native kernels for {' and '.join(LIBRARIES)} only"
    if device_type == "cuda":
        why_not_cpu = load("cpu")  # it holds the schemas
        if why_not_cpu is not None:
            return why_not_cpu
    name = LIBRARIES[device_type]
    files = sorted(path for path in PACKAGE.glob(f"{name}.*") if path.suffix in (".so", ".pyd", ".dylib"))
    attempts = []
    for path in files:
        try:
            torch.ops.load_library(str(path))
        except Exception as error:  # whatever a foreign binary does at load must not break the package
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
    """Why it cannot compute on a device type; None when it can."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return load("cuda") or "torch sees no CUDA device"
    return load(device_type)


def kernels() -> dict[str, Kernel]:
    """The kernels; torch's dispatcher tells the CPU's from CUDA's."""
    namespace: Any = torch.ops.doodl_fast_native
    return {name: getattr(namespace, name).default for name in OPS}


def instruction_set() -> str | None:
    """Which CPU kernels run here ("avx2", "baseline"); None when they are not there."""
    if load("cpu") is not None:
        return None
    name: str = torch.ops.doodl_fast_native.instruction_set()
    return name


def _register_fakes() -> None:
    for name in OPS:
        torch.library.register_fake(f"doodl_fast_native::{name}", _returns_nothing)


def _returns_nothing(*_: Any) -> None:
    """All outputs are arguments that the kernels fill."""
