"""DOODL in the forms that other programs have: a pipeline in the manner of diffusers, and a block of its modular ones.

The nodes for ComfyUI are in the repository's folder `integrations/comfyui`. See docs/integrations.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .block import DoodlNoiseStep
    from .pipeline import DoodlPipeline, DoodlPipelineOutput

__all__ = ["DoodlNoiseStep", "DoodlPipeline", "DoodlPipelineOutput"]

_HOMES = {"DoodlNoiseStep": "block", "DoodlPipeline": "pipeline", "DoodlPipelineOutput": "pipeline"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for, because that imports diffusers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names."""
    return sorted(__all__)
