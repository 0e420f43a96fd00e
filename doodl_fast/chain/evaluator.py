"""`Evaluator`: what a chain asks of the function f in its couplings, `target <- a target + c source + b f(source, t)`.

`Denoiser` is the usual one. To put another function into a chain, derive from `Evaluator` and define `__call__`; every
other method has a default that suits a plain function without weights.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor


class Recordings(Protocol):
    """Recordings of an evaluator's calls and their VJPs, which are replayed in place of calls (docs/cuda-graphs.md).

    Attributes:
        why_not: Why the latest call was not replayed; None if it was.
        seconds: What a call like the latest one takes, and its replay, each with the VJP if it has a graph; None if it
            was not replayed.
    """

    why_not: str | None
    seconds: tuple[float, float] | None

    def refuse(self, reason: str) -> None:
        """Says why calls are not replayed."""

    def clear(self) -> None:
        """Frees all recordings."""


class Evaluator(ABC):
    """The function f of a chain's couplings, with everything that its gradient needs to know of it.

    A backward pass evaluates f again, so f must return the same value whenever it is given the same arguments.

    Example:
        >>> class Decay(Evaluator):
        ...     def __call__(self, x, t, tensors=None, latents_dtype=None):
        ...         return -x
        >>> chain = Chain(Decay(), [Coupling(0, b=0.1, tag=t) for t in range(10)])
    """

    _raw_is_current: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._raw_is_current = _raw_is_current(cls)

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        t: Any,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Evaluates f.

        Args:
            x: The source of the coupling, (B, C, ...), in the dtype of the chain's state.
            t: The coupling's tag, a timestep for instance.
            tensors: Used in place of what `tensors()` returns, in that order; None means those themselves.
            latents_dtype: The dtype of the latents that the caller gave to the chain; None means x's.

        Returns:
            f(x, t), of x's shape and dtype.
        """

    def raw(
        self,
        x: Tensor,
        t: Any,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, float | None]:
        """The network's own output, for the fused operators to cast and combine; arguments as in `__call__`.

        A subclass that overrides `__call__` alone is evaluated by its `__call__`: an inherited `raw` would bypass it.

        Returns:
            Either (f, None), where f has any floating dtype, or ([u; v], g), where the two halves of a batch of 2B are
            combined to `f = u + g (v - u)` (classifier-free guidance, arXiv 2207.12598).
        """
        return self(x, t, tensors, latents_dtype), None

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors besides x that f depends on, weights excepted. Those that require grad are given gradients."""
        return ()

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        """The dtype that the network computes in. Where it is fp16 or bf16 the engine scales the cotangents."""
        return latents_dtype

    def running(self) -> contextlib.AbstractContextManager[None]:
        """A context that every forward run and every backward pass enters."""
        return contextlib.nullcontext()

    def for_vjp(self) -> Evaluator | None:
        """Another evaluator of the same function whose VJPs are to be taken instead of this one's, or None."""
        return None

    @property
    def insists_on_vjps(self) -> bool:
        """Whether the caller asked for the VJPs of `for_vjp` by name, so that plain autograd must be refused."""
        return False

    def for_blocks(self) -> Evaluator | None:
        """The same function by a network that checkpoints its blocks, or None if it has no blocks that can be."""
        return None

    def for_recompute(self) -> Evaluator | None:
        """The same function by a network whose graphs keep less, as it computes some matrix products again, or None."""
        return None

    def plain(self) -> Evaluator:
        """The same function by a network that is differentiated by PyTorch's own autograd and nothing else."""
        return self

    def recordings(self, device: torch.device) -> Recordings | None:
        """The recordings of calls on a device, which are replayed in place of calls; None if none are made there."""
        return None

    def launched(self) -> Evaluator:
        """The same function by calls that are never replayed."""
        return self

    def weights(self) -> tuple[tuple[str, Tensor], ...]:
        """The name and the tensor of every parameter and every buffer that f depends on."""
        return ()


def raw_output(
    evaluator: Evaluator, x: Tensor, t: Any, tensors: Sequence[Tensor] | None, latents_dtype: torch.dtype | None
) -> tuple[Tensor, float | None]:
    """What `evaluator.raw` returns, or `(evaluator(...), None)` if its class overrides `__call__` alone."""
    if evaluator._raw_is_current:
        return evaluator.raw(x, t, tensors, latents_dtype)
    return evaluator(x, t, tensors, latents_dtype), None


def guided_output(raw: tuple[Tensor, float | None], dtype: torch.dtype) -> Tensor:
    """Combines what `Evaluator.raw` returns to f, in float32 at least, and casts it.

    Args:
        raw: (f, None), or ([u; v], g) for `u + g (v - u)`.
        dtype: The dtype of the result.
    """
    output, scale = raw
    output = output.to(torch.promote_types(dtype, torch.float32))
    if scale is not None:
        uncond, cond = output.chunk(2)
        output = uncond + scale * (cond - uncond)
    return output.to(dtype)


def _raw_is_current(cls: type) -> bool:
    """Whether `raw` is defined by the same class as `__call__`, or by one nearer to `cls`."""
    for base in cls.__mro__:
        if "raw" in vars(base):
            return base is not Evaluator
        if "__call__" in vars(base):
            return False
    return False


def as_evaluator(function: Any) -> Evaluator:
    """`function` itself if it is an `Evaluator`; else an adapter around an object that has some of its methods.

    Raises:
        TypeError: If `function` is not callable.
    """
    if isinstance(function, Evaluator):
        return function
    if not callable(function):
        raise TypeError(
            f"evaluator: expected an Evaluator, or an object with its methods, got {type(function).__name__}"
        )
    return (_AdaptedRaw if _raw_is_current(type(function)) else _Adapted)(function)


class _Adapted(Evaluator):
    """Gives an object that merely has methods of `Evaluator` the defaults of those that it lacks."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(
        self,
        x: Tensor,
        t: Any,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return cast(Tensor, self.function(x, t, tensors, latents_dtype))

    def _method(self, name: str) -> Any:
        """The object's own method of that name, else the default."""
        return getattr(self.function, name, None) or getattr(super(), name)

    def tensors(self) -> tuple[Tensor, ...]:
        return cast("tuple[Tensor, ...]", self._method("tensors")())

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        return cast(torch.dtype, self._method("compute_dtype")(latents_dtype))

    def running(self) -> contextlib.AbstractContextManager[None]:
        return cast("contextlib.AbstractContextManager[None]", self._method("running")())

    def for_vjp(self) -> Evaluator | None:
        other = self._method("for_vjp")()
        return None if other is None else as_evaluator(other)

    @property
    def insists_on_vjps(self) -> bool:
        return getattr(self.function, "vjp_dtype", None) not in (None, "auto")

    def for_blocks(self) -> Evaluator | None:
        other = self._method("for_blocks")()
        return None if other is None else as_evaluator(other)

    def for_recompute(self) -> Evaluator | None:
        other = self._method("for_recompute")()
        return None if other is None else as_evaluator(other)

    def plain(self) -> Evaluator:
        own = getattr(self.function, "plain", None)
        return self if own is None else as_evaluator(own())

    def recordings(self, device: torch.device) -> Recordings | None:
        return cast("Recordings | None", self._method("recordings")(device))

    def launched(self) -> Evaluator:
        own = getattr(self.function, "launched", None)
        return self if own is None else as_evaluator(own())

    def weights(self) -> tuple[tuple[str, Tensor], ...]:
        return cast("tuple[tuple[str, Tensor], ...]", self._method("weights")())


class _AdaptedRaw(_Adapted):
    """The same for an object that has a `raw` of its own."""

    def raw(
        self,
        x: Tensor,
        t: Any,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, float | None]:
        return cast("tuple[Tensor, float | None]", self.function.raw(x, t, tensors, latents_dtype))
