"""Module names of version 0.1 go on working for one more version, with a DeprecationWarning.

`import doodl_fast` installs an importer for the names in `MOVED`. `from doodl_fast.denoiser import Denoiser` gives the
very objects of `doodl_fast.diffusion.denoiser`, because the importer returns the new module itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    "arithmetic": "chain.arithmetic",
    "demo": "cli.demo",
    "denoiser": "diffusion.denoiser",
    "doctor": "cli.doctor",
    "doodl": "optimization.loop",
    "drift": "cli.drift",
    "editing": "cli.edit",
    "engine": "chain.run",
    "estimate": "cli.estimate",
    "evaluator": "chain.evaluator",
    "exact": "chain.exact.arithmetic",
    "files": "cli.files",
    "latents": "optimization.update",
    "lattice": "chain.exact.lattice",
    "lattice_state": "chain.exact.state",
    "lean": "optimization.low_memory",
    "memory": "chain.memory.plan",
    "memory_tracker": "chain.memory.tracker",
    "modules": "diffusion.networks",
    "guides": "cli.guides",
    "contenders": "cli.baselines",
    "profile_command": "cli.profile",
    "ops.registry": "ops.backends.registry",
    "ops.native": "ops.backends.native",
    "ops.triton_backend": "ops.backends.triton",
    "ops.triton_kernels": "ops.backends.triton_kernels",
    "ops.triton_lattice": "ops.backends.triton_lattice",
    "node": "chain.autograd",
    "pipeline": "diffusion.pipeline",
    "planner": "chain.memory.planner",
    "profiling": "chain.memory.profiling",
    "program": "chain.program",
    "reversibility": "chain.reversibility",
    "runstate": "optimization.checkpoint",
    "schedule": "diffusion.schedule",
    "trust": "chain.checks",
}


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old module names and loads the new modules for them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix(PACKAGE + ".") not in MOVED or not fullname.startswith(PACKAGE + "."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = f"{PACKAGE}.{MOVED[spec.name.removeprefix(PACKAGE + '.')]}"
        warnings.warn(
            f"{spec.name} has moved to {new}; the old name will go in version 0.3", DeprecationWarning, stacklevel=2
        )
        module = importlib.import_module(new)
        self._specs[module.__name__] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module was executed under its new name. Python has just given it the spec of the old one.
        module.__spec__ = self._specs.pop(module.__name__)


def install() -> None:
    """Adds the importer behind all others, unless it is there."""
    if not any(isinstance(finder, _Importer) for finder in sys.meta_path):
        sys.meta_path.append(_Importer())
