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
ARCHITECTURES = "cuda architectures"
"""The entry of the report with the compute capabilities that the CUDA kernels were compiled for, "80 90" for 8.0 and
9.0. The last one is also there as PTX, which newer cards translate."""
OPS = tuple(signature.name for signature in TABLE)


def build_report() -> dict[str, str]:
    """Returns what setup.py recorded: for each type of device "built", or why its library was not built.

    If the CUDA kernels were built, it also has what they were compiled for. It is empty if setup.py has not run.
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
        missing = [name for name in OPS if not hasattr(torch.ops.doodl_fast_native, name)]
        if missing:  # The sources are newer than the build.
            attempts.append(f"{path.name} is of another version and lacks {missing[0]}; install from source again")
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
    reason = load(device_type)
    if device_type != "cuda" or reason is not None:
        return reason
    return _why_not_cards() if torch.cuda.is_available() else "torch sees no CUDA device"


def _why_not_cards() -> str | None:
    """Returns which card there is no compiled kernel for, or None if there is one for every card that torch sees.

    The backend is chosen for all cards together, so a single old one refuses it.
    """
    compiled = [int(sm) for sm in build_report().get(ARCHITECTURES, "").split()]
    if not compiled:  # The library was built before setup.py recorded this.
        return None
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        card = 10 * major + minor
        # A compiled kernel runs on cards of its own generation that are not older; PTX runs on all that are not older.
        if not any(sm // 10 == major and sm <= card for sm in compiled) and card < compiled[-1]:
            there = " and ".join(f"{sm / 10:.1f}" for sm in compiled)
            return (
                f"its kernels were compiled for compute capability {there}, "
                f"and cuda:{index} ({torch.cuda.get_device_name(index)}) has {major}.{minor}; hide that card by "
                "CUDA_VISIBLE_DEVICES, or build again with its number in TORCH_CUDA_ARCH_LIST"
            )
    return None


def kernels(device_type: str) -> dict[str, Kernel]:
    """Returns the kernels for a type of device, by the names of their ops."""
    namespace: Any = torch.ops.doodl_fast_native
    return {row.name: getattr(namespace, row.name).default for row in TABLE if device_type in row.native_devices}


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
