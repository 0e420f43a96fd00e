"""Finds out whether a transform of PyTorch, such as `torch.func.jvp` or `torch.vmap`, reaches a chain's tensors.

The fused operators and the chain's own backward pass work on ordinary tensors. A transform passes special tensors in
their place, whose tangent or batch would be lost without a word, so a chain looks for them before it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch: Any = torch._C._functorch
_LEGACY_BATCH: Any = torch._C._parse_dispatch_key("Batched")  # type: ignore[attr-defined]


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor stands for others under `torch.vmap` or `torch.func`, so that its values cannot be read."""
    wrapped: bool = _functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or _is_legacy_batch(tensor)


def _is_legacy_batch(tensor: Tensor) -> bool:
    """Whether it is a batch of the older vmap, which `torch.autograd.grad(is_grads_batched=True)` still uses."""
    batch: bool = torch._C._dispatch_keys(tensor).has(_LEGACY_BATCH)
    return batch


def transform_of(*tensors: Tensor) -> str | None:
    """The name of the transform that reaches one of the tensors, or None for ordinary tensors."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return "forward-mode AD (torch.func.jvp, jacfwd, torch.autograd.forward_ad)"
    for tensor in tensors:
        if is_wrapped(tensor):
            if _functorch.is_batchedtensor(tensor) or _is_legacy_batch(tensor):
                return "torch.vmap (torch.func.vmap, is_grads_batched, vectorize=True)"
            return "torch.func (grad, vjp, jacrev)"
    return None


def refuse_transforms(what: str, *tensors: Tensor) -> None:
    """Raises RuntimeError if a transform reaches one of the tensors. what: how the error calls them."""
    transform = transform_of(*tensors)
    if transform is not None:
        raise RuntimeError(
            f"{what}: expected ordinary tensors, got those of {transform}, which the chain's own backward pass and "
            'fused operators do not support; use memory="naive", which is plain PyTorch'
        )
