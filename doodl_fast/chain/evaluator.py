"""What the engine asks of the function f in a coupling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Raw = Callable[..., tuple[Tensor, float | None]]


class Evaluator(Protocol):
    """f(x, tag), as `Denoiser` and the one-step guidance have it.

    It may also have `raw`, with the arguments of `__call__`, which returns the network's own output and g: f(x, tag) of
    any dtype and None, or [u; v] of twice the batch and the g in `f = u + g (v - u)`. The combination, its cast and
    those of their cotangents are then left to the fused ops. A subclass that overrides `__call__` alone is called by
    it.
    """

    def __call__(
        self,
        x: Tensor,
        t: Any,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """f(x, tag) in x's shape and dtype, with `tensors` in place of its own; the same value at every call."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The other tensors it depends on; those that require grad are given gradients."""
        ...

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        """The dtype it computes in (cotangents are scaled for fp16 and bf16)."""
        ...

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Entered for the length of a forward or backward run."""
        ...


def vjp_evaluator(evaluator: Evaluator) -> Evaluator | None:
    """What the evaluator wants its VJPs taken of instead of itself: its `for_vjp()`, if it has one."""
    method = getattr(evaluator, "for_vjp", None)
    other: Evaluator | None = None if method is None else method()
    return other


def block_evaluator(evaluator: Evaluator) -> Evaluator | None:
    """The evaluator whose graphs hold the inputs of its network's blocks alone: its `for_blocks()`, if it has one."""
    method = getattr(evaluator, "for_blocks", None)
    other: Evaluator | None = None if method is None else method()
    return other


def raw_method(evaluator: Evaluator) -> Raw | None:
    """The evaluator's `raw`, unless a class nearer than the one that has it overrides `__call__` alone."""
    for cls in type(evaluator).__mro__:
        if "raw" in vars(cls):
            raw: Raw = evaluator.raw  # type: ignore[attr-defined]
            return raw
        if "__call__" in vars(cls):
            break
    return None


def insists_on_vjps(evaluator: Evaluator) -> bool:
    """Whether plain autograd through the evaluator would not be what its `vjp_dtype`, if it has one, asks for."""
    return getattr(evaluator, "vjp_dtype", None) not in (None, "auto")
