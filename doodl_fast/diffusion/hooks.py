"""The hooks by which diffusers and accelerate move, cast or cache what a network has: recognised, and not imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .networks import FLOAT_DTYPES

CASTING = "layerwise_casting"
"""The hook that keeps a layer's weights in another dtype, fp8 for instance, than it computes in."""


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """Returns the hooks of diffusers that a module has itself, by their names."""
    hooks: dict[str, Any] = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})
    return hooks


def cast_for_calls(module: nn.Module) -> torch.dtype | None:
    """Returns the dtype that a module's own weights are cast to for each call; None if they stay as they are."""
    dtype: torch.dtype | None = getattr(hooks_of(module).get(CASTING), "compute_dtype", None)
    return dtype


def computes_in(network: nn.Module) -> torch.dtype | None:
    """Returns the dtype that a network's layers are cast to for each call; None if none of them is."""
    return next((dtype for module in network.modules() if (dtype := cast_for_calls(module)) is not None), None)


def first_weight(network: nn.Module | None) -> tuple[Tensor, torch.dtype] | None:
    """Returns the first of a network's weights that it computes with, and the dtype that it has then, or None."""
    if network is None:
        return None
    # diffusers keeps these in float32, whatever the dtype of the others.
    kept = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    first = None
    for name, module in network.named_modules():
        for key, weight in module._parameters.items():
            dtype = None if weight is None else cast_for_calls(module) or weight.dtype
            # float8 and integer weights are storage formats that the module unpacks itself.
            if weight is not None and dtype in FLOAT_DTYPES:
                if not any(part in f"{name}.{key}" for part in kept):
                    return weight, dtype
                first = (weight, dtype) if first is None else first
    return first


def device_of(network: nn.Module) -> torch.device:
    """Returns where a network computes, also if its weights are elsewhere between its calls (offloaded)."""
    for module in network.modules():
        hook = module.__dict__.get("_hf_hook")
        for inner in (hook, *getattr(hook, "hooks", ())):
            device = getattr(inner, "execution_device", None)
            if device is not None:
                return torch.device(device)
        for inner in hooks_of(module).values():
            device = getattr(getattr(inner, "config", None), "onload_device", None)
            if device is not None:
                return torch.device(device)
    own = getattr(network, "device", None)
    return own if isinstance(own, torch.device) else next(network.parameters()).device


def refuse_caches(network: nn.Module) -> None:
    """Raises ValueError for a network that keeps what it computed in one call for the next ones."""
    for name, module in network.named_modules():
        for hook, value in hooks_of(module).items():
            if getattr(value, "_is_stateful", False):
                where = f"{type(module).__name__} {name!r}" if name else type(module).__name__
                raise ValueError(
                    f"unet: {where} has the hook {hook!r}, by which its output depends on earlier calls, so no "
                    "gradient can be right; call disable_cache() of the network first"
                )
