"""What a `Denoiser` calls while a run is under way: copies of the network that are made for that run.

They are kept by thread. So the runs of several threads do not meet, although they share a denoiser and its network.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .calling import NetworkCall
from .module_copies import ModuleCopies, why_not_copied
from .networks import blocks_checkpointed, without_weight_grad


@dataclass(frozen=True)
class Variant:
    """How a network is called.

    Attributes:
        cast_to: The dtype that its weights are cast to, or None.
        checkpoints: Whether its blocks are checkpointed.
    """

    cast_to: torch.dtype | None = None
    checkpoints: bool = False


@dataclass(eq=False)
class ActiveCall:
    """One run, or one VJP, in one thread.

    Attributes:
        original: How the caller's own network is called.
        variant: What the run asked for.
        call: How the run calls the network.
        casts: Copies with cast weights, which are made at the first VJP of the run and freed at its end.
    """

    original: NetworkCall
    variant: Variant
    call: NetworkCall
    casts: dict[Variant, ModuleCopies] = field(default_factory=dict)

    def calls(self, call: NetworkCall) -> bool:
        """Whether this run calls the same network in the same way."""
        return self.original.network is call.network and self.original.compiles == call.compiles


class _Thread(threading.local):
    """The runs of each thread that are under way, the innermost last."""

    def __init__(self) -> None:
        self.active: list[ActiveCall] = []


_THREAD = _Thread()


def active_call(call: NetworkCall, variant: Variant) -> NetworkCall:
    """Returns how this thread calls a network: by the copies of the innermost run, or as it is outside of runs."""
    for active in reversed(_THREAD.active):
        if active.calls(call) and active.variant == variant:
            return active.call
    return call


@contextlib.contextmanager
def calling_copies(call: NetworkCall, module: nn.Module, variant: Variant) -> Iterator[None]:
    """Lets `active_call` find copies of a network in this thread, for the length of the context.

    The weights of the copies do not require grad. Where copies would not do what the network does (see
    `why_not_copied`), the network itself is called, and its flags are set for the length of the context.

    Args:
        call: How the network is called.
        module: The module behind it.
        variant: How the copies differ from it. Weights can be cast in copies alone.
    """
    if variant.cast_to is not None:
        with _cast_copies(call, module, variant) as copies, _pushed(call, variant, copies):
            yield
    elif why_not_copied(module, call.network) is None:
        copies = ModuleCopies(module, checkpoints=variant.checkpoints)
        with contextlib.ExitStack() as stack:
            stack.callback(copies.write_back)
            stack.enter_context(_pushed(call, variant, copies))
            yield
    else:
        blocks = blocks_checkpointed(module) if variant.checkpoints else contextlib.nullcontext()
        with without_weight_grad(module), blocks:
            yield


@contextlib.contextmanager
def _pushed(call: NetworkCall, variant: Variant, copies: ModuleCopies) -> Iterator[None]:
    """Makes copies what this thread calls. Those with cast weights that are made inside are freed at the end."""
    active = ActiveCall(call, variant, call.of(copies.of(call.network)))
    _THREAD.active.append(active)
    try:
        yield
    finally:
        _THREAD.active.remove(active)
        for cast in active.casts.values():
            cast.write_back()
            cast.release()


@contextlib.contextmanager
def _cast_copies(call: NetworkCall, module: nn.Module, variant: Variant) -> Iterator[ModuleCopies]:
    """Yields copies with cast weights: those of the run that is under way, or else copies for this context alone."""
    outer = next((a for a in reversed(_THREAD.active) if a.calls(call) and a.variant.cast_to is None), None)
    if outer is not None:
        if variant not in outer.casts:
            outer.casts[variant] = ModuleCopies(module, variant.cast_to, checkpoints=variant.checkpoints)
        yield outer.casts[variant]
        return
    copies = ModuleCopies(module, variant.cast_to, checkpoints=variant.checkpoints)
    try:
        yield copies
    finally:
        copies.write_back()
        copies.release()
