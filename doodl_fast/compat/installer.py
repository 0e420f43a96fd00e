"""`install`, which makes code that imports `memcnn` and `doodl` use this package, without a changed line in it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import warnings
from types import ModuleType
from typing import Any

from torch import nn

from . import memcnn
from .layers import MixingLayer, SteppingLayer
from .quirks import Quirks
from .schedule import DEFAULT

_LAYERS = {"SteppingLayer": SteppingLayer, "MixingLayer": MixingLayer}


def install(module: str = "doodl", *, layers: bool = True, quirks: Quirks = DEFAULT) -> None:
    """Makes `import memcnn` give `compat.memcnn`, and replaces the layers of the DOODL code when that is imported.

    Nothing is imported by this function, and no file is changed. A second call replaces the first one.

    Args:
        module: The name under which the DOODL code is imported. If it already is imported, it is changed at once.
        layers: Whether the module's `SteppingLayer` and `MixingLayer` are replaced, and the networks among its
            variables are frozen (`requires_grad_(False)`), as no DOODL code uses gradients of weights. If not, only
            `memcnn` is replaced. A layer that takes other arguments than the reference's is left as it is, with a
            warning.
        quirks: The quirks of the layers.

    Raises:
        ValueError: `module` cannot be the name of a module.

    Example:
        >>> from doodl_fast.compat import install
        >>> install()
        >>> import doodl
    """
    if not isinstance(module, str) or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"module: expected the name of a module, such as 'doodl', got {module!r}")
    uninstall()
    global _installed
    _installed = _Installation(module, layers, quirks)
    _installed.begin()


def uninstall() -> None:
    """Undoes everything that `install` did. Without an earlier `install` it does nothing."""
    global _installed
    if _installed is not None:
        _installed.end()
        _installed = None


class _Installation(importlib.abc.MetaPathFinder):
    """An import hook that lets the other finders find the module `name`, and changes the module after its import."""

    def __init__(self, name: str, layers: bool, quirks: Quirks) -> None:
        self.name, self.layers, self.quirks = name, layers, quirks
        self._undo: list[tuple[Any, str, Any]] = []
        self._frozen: list[nn.Parameter] = []
        self._searching = False

    def begin(self) -> None:
        """Replaces `memcnn`, sets up the import hook, and changes the module if it is imported already."""
        self._memcnn = sys.modules.get("memcnn")
        sys.modules["memcnn"] = memcnn
        sys.meta_path.insert(0, self)
        if self.name in sys.modules:
            self.change(sys.modules[self.name])

    def end(self) -> None:
        """Restores everything as it was before `begin`."""
        sys.meta_path.remove(self)
        if self._memcnn is not None:
            sys.modules["memcnn"] = self._memcnn
        else:
            sys.modules.pop("memcnn", None)
        for owner, name, value in reversed(self._undo):
            setattr(owner, name, value)
        for weight in self._frozen:
            weight.requires_grad_(True)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """Returns the spec that the other finders return for the module, with a loader that changes the module."""
        if fullname != self.name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def change(self, module: ModuleType) -> None:
        """Replaces the wrapper and the layers of an imported module, and freezes the networks among its variables."""
        if isinstance(getattr(module, "memcnn", None), ModuleType):
            self._set(module, "memcnn", memcnn)
        # The module may also have done `from memcnn import InvertibleModuleWrapper`.
        wrapper = getattr(module, "InvertibleModuleWrapper", None)
        if isinstance(wrapper, type):
            self._set(module, "InvertibleModuleWrapper", memcnn.InvertibleModuleWrapper)
        if not self.layers:
            return
        for name, ours in _LAYERS.items():
            theirs = getattr(module, name, None)
            if isinstance(theirs, type) and _fits(theirs, ours):
                self._set(module, name, self._with_quirks(ours))
        for value in list(vars(module).values()):
            if isinstance(value, nn.Module):
                weights = [weight for weight in value.parameters() if weight.requires_grad and weight.is_leaf]
                self._frozen += weights
                value.requires_grad_(False)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute, and notes its old value for `end`."""
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _with_quirks(self, layer: type[nn.Module]) -> type[nn.Module]:
        """Returns a layer whose default quirks are those of this installation."""
        if self.quirks == DEFAULT:
            return layer

        def init(this: Any, *args: Any, **options: Any) -> None:
            layer.__init__(this, *args, **{"quirks": self.quirks, **options})

        return type(layer.__name__, (layer,), {"__init__": init, "__doc__": layer.__doc__})


_installed: _Installation | None = None


class _Loader(importlib.abc.Loader):
    """Loads a module by another loader, and then lets the installation change it."""

    def __init__(self, loader: Any, installation: _Installation) -> None:
        self._loader, self._installation = loader, installation

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Creates the module by the other loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module, and changes it unless the installation has ended since."""
        self._loader.exec_module(module)
        if _installed is self._installation:
            self._installation.change(module)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the other loader, such as `get_source`."""
        return getattr(self._loader, name)


def _fits(theirs: type, ours: type) -> bool:
    """Returns whether our layer accepts all arguments of theirs, at construction and in calls; warns if not."""
    for method in ("__init__", "forward", "inverse"):
        known = set(inspect.signature(getattr(ours, method)).parameters)
        more = [name for name in inspect.signature(getattr(theirs, method)).parameters if name not in known]
        if more:
            warnings.warn(
                f"install: {theirs.__module__}.{theirs.__name__}.{method} takes {', '.join(map(repr, more))}, which "
                f"doodl_fast's does not, so that layer is left as it is; derive it from "
                f"doodl_fast.compat.doodl.{ours.__name__} and override predict_noise (docs/migration.md)",
                UserWarning,
                stacklevel=4,
            )
            return False
    return True
