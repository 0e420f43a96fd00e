"""Gradient checkpointing of a network's blocks (Chen et al., arXiv 1604.06174) that keeps tensors of some KiB.

A checkpointed block keeps its inputs, and is computed again when its gradient is, up to the operator that saves the
last tensor. `torch.utils.checkpoint` drops every saved tensor. In a block of a diffusion transformer the last one is a
gate, one number for each channel, and it is saved after the largest matrix products, which are then computed again for
it alone. `checkpoint` keeps such tensors, and stops before those products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

SMALL_SHARE = 0.01
"""A saved tensor is kept if its storage is at most this share of the block's inputs."""


def checkpoint(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a block whose graph keeps its inputs and what is small beside them; the rest is computed again.

    What the block computes must depend on its arguments alone: it draws no random numbers. A graph may be
    differentiated several times, and second derivatives can be taken. Calls may be nested, also inside calls of
    `torch.utils.checkpoint` and around them. While torch.compile traces, `torch.utils.checkpoint` does all of this.

    Args:
        block: A module or a function.
        *args: Its arguments; tensors may be in lists, tuples and dicts.
        **kwargs: The same by name.

    Returns:
        What the block returns.
    """
    if torch.compiler.is_compiling():
        from torch.utils.checkpoint import checkpoint as compiled

        return compiled(block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    if not torch.is_grad_enabled():
        return block(*args, **kwargs)
    frame = _Frame(block, args, kwargs)
    with torch.autograd.graph.saved_tensors_hooks(frame.pack, frame.unpack):
        return block(*args, **kwargs)


class _Enough(Exception):
    """All tensors that a block's gradient needs have been computed again."""


class _Inputs(torch.autograd.Function):
    """Saves a block's inputs as the graph of an operator does: with a check that they are not changed in place, and so
    that an outer checkpoint can drop them."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return leaf.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise AssertionError("only the saved tensors of this node are used")


class _Frame:
    """One call of a block: its inputs, and what its graph has saved, as numbers in the order of saving."""

    def __init__(self, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._block = block
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        # Not its node alone: up to torch 2.11 a node loses what it has saved when its output is freed.
        self._inputs: Tensor = _Inputs.apply(torch.empty(0, requires_grad=True), *tensors)  # type: ignore[no-untyped-call]
        self._small = SMALL_SHARE * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        kinds = {"cpu", *(tensor.device.type for tensor in tensors)}
        self._autocasts = [_autocast(kind) for kind in kinds if torch.amp.is_autocast_available(kind)]
        self._count = 0
        self._again: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor | int:
        """Keeps a small tensor, and drops another."""
        if self._is_small(tensor):
            return tensor.detach()
        self._count += 1
        return self._count - 1

    def unpack(self, packed: Tensor | int) -> Tensor:
        """Returns what was kept, or what is computed again."""
        if isinstance(packed, Tensor):
            return packed
        if packed not in self._again:
            self._compute_again()
        return self._again.pop(packed)

    def _is_small(self, tensor: Tensor) -> bool:
        return (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.layout == torch.strided
            and tensor.untyped_storage().nbytes() <= self._small
        )

    def _compute_again(self) -> None:
        """Computes the block again until it has saved what it saved the first time."""
        number = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal number
            if not self._is_small(tensor):
                self._again[number] = tensor.detach()
                number += 1
                if number == self._count:
                    raise _Enough
            return tensor.detach()

        leaves = list(self._others)
        inputs: Any = self._inputs.grad_fn
        for where, tensor in zip(self._where, inputs.saved_tensors, strict=True):
            leaves[where] = tensor  # The very tensor of the first call, if no outer checkpoint has dropped it.
        with (
            _entered(self._autocasts),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            contextlib.suppress(_Enough),
        ):
            args, kwargs = tree_unflatten(leaves, self._structure)
            self._block(*args, **kwargs)
        if number != self._count:
            raise RuntimeError(
                f"unet: a checkpointed block saved {self._count} tensors for its gradient, and {number} when it was "
                "computed again; it must compute the same whenever it is given the same arguments"
            )


def _autocast(kind: str) -> torch.autocast:
    """What sets up autocast as it is now on a type of device."""
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled()
    )


@contextlib.contextmanager
def _entered(contexts: list[torch.autocast]) -> Iterator[None]:
    """Enters several contexts."""
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
