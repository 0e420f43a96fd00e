"""Puts lean layers in place of those of copied modules, and reports which are replaced and which are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .group_norm import note_pairs
from .layers import FREE, PATTERNS, name_of
from .level import Level, level_of
from .rotary import use_fused_rotary, why_not_fused

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = tuple(name for name, value in nn.Module().__dict__.items() if "hooks" in name and not value and name[0] == "_")
ONLY_RECOMPUTE = 'only lean="recompute" replaces it'
_CLASSES: dict[tuple[type, Level], type] = {}
"""The lean subclass of each class and level."""


def why_not_replaced(layer: nn.Module, level: Level) -> str | None:
    """Returns why a layer of a class in the table is left as it is, or None if it is replaced.

    Args:
        layer: The caller's layer.
        level: How lean the network is to be.
    """
    pattern = PATTERNS[name_of(type(layer))]
    if level < pattern.level:
        return ONLY_RECOMPUTE
    attributes = layer.__dict__
    if "forward" in attributes:
        return "its forward method was replaced"
    if any(attributes.get(name) for name in _HOOKS):
        return "it has hooks"
    if any(isinstance(attributes.get(name), torch.Tensor) for name in ("weight", "bias")):
        return "its weight or bias is no parameter"
    for name, weight in layer._parameters.items():
        if weight is not None and type(weight) not in (nn.Parameter, torch.Tensor):
            return f"its {name} is of type {type(weight).__name__}"
        if weight is not None and weight.dtype not in FLOATS:
            return f"its {name} is of dtype {str(weight.dtype).removeprefix('torch.')}"
    return pattern.refuse(layer)


def lean_class(cls: type, level: Level) -> type:
    """The subclass of a class in the table that runs in the lean way. Its instances have the same attributes."""
    key = (cls, level)
    if key not in _CLASSES:
        body = {
            "forward": PATTERNS[name_of(cls)].make(cls),
            "_doodl_fast_level": level,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
        }
        _CLASSES[key] = type(cls.__name__, (cls,), body)
    return _CLASSES[key]


def substitute(pairs: Iterable[tuple[nn.Module, nn.Module]], level: Level) -> None:
    """Makes copied layers lean, by a subclass of their class, unless their weights are trained.

    The originals are only read.

    Args:
        pairs: Each module of a network, and its copy.
        level: How lean the copies are to be.
    """
    if level is Level.OFF:
        return
    blocks = []
    for original, copied in pairs:
        name = name_of(type(original))
        trained = any(w is not None and w.is_leaf and w.requires_grad for w in copied._parameters.values())
        if name in PATTERNS and not trained and why_not_replaced(original, level) is None:
            kind: Any = lean_class(type(original), level)
            copied.__class__ = kind
        use_fused_rotary(name, copied)
        blocks.append((name, copied))
    note_pairs(blocks, lean_class(nn.GroupNorm, level), lean_class(nn.SiLU, level))


def has_lean_layers(network: nn.Module, level: Level) -> bool:
    """Whether any layer of a network would be replaced at a level."""
    return level is not Level.OFF and any(
        name_of(type(layer)) in PATTERNS and why_not_replaced(layer, level) is None for layer in network.modules()
    )


def gains_by_recompute(network: nn.Module) -> bool:
    """Whether graphs of a network keep less with lean="recompute" than with lean=True."""
    for layer in network.modules():
        pattern = PATTERNS.get(name_of(type(layer)))
        if pattern is not None and pattern.gains and why_not_replaced(layer, Level.RECOMPUTE) is None:
            return True
    return False


@dataclass
class LeanReport:
    """Which layers of a network run in a lean way. It prints itself as a short table.

    Attributes:
        level: How lean the network was to be.
        replaced: The number of replaced layers of each class.
        left: The number of layers that were left alone, by their class and the reason.
        unknown: The number of layers of classes that there is no lean way for.
    """

    level: Level
    replaced: Counter[str] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        rows = [f"  {count:>5} {name}" for name, count in sorted(self.replaced.items())]
        lines = ["lean layers", *(rows or ["  none"])]
        if self.left:
            lines.append("left as they are")
            lines += [f"  {count:>5} {name}: {why}" for (name, why), count in sorted(self.left.items())]
        if self.unknown:
            lines.append("without a lean way")
            lines += [f"  {count:>5} {name}" for name, count in sorted(self.unknown.items())]
        return "\n".join(lines)


def lean_report(network: nn.Module, lean: bool | str = True) -> LeanReport:
    """Reports which layers of a network would run in a lean way, and why others would not. It changes nothing.

    Args:
        network: The network.
        lean: True, or "recompute".

    Example:
        >>> print(lean_report(pipe.unet))
    """
    report = LeanReport(level_of(lean))
    for layer in network.modules():
        cls = type(layer)
        name = name_of(cls)
        _report_rotary(report, layer)
        if report.level is Level.OFF or name not in PATTERNS:
            if name not in FREE and not layer._modules:
                report.unknown[cls.__name__] += 1
            continue
        why = why_not_replaced(layer, report.level)
        if why is None:
            report.replaced[cls.__name__] += 1
        elif name not in FREE:
            report.left[cls.__name__, why] += 1
    return report


def _report_rotary(report: LeanReport, layer: nn.Module) -> None:
    """Notes whether the rotary embeddings of an attention layer's processor are one op."""
    processor = getattr(layer, "processor", None)
    why = why_not_fused(processor)
    if why == "" or report.level is Level.OFF:
        return
    name = type(processor).__name__
    if why is None:
        report.replaced[name] += 1
    else:
        report.left[name, why] += 1
