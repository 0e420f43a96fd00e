"""What a `Denoiser` calls while a run is under way: the network, or copies of it that are made for that run.

They are kept by thread. So the runs of several threads do not meet, although they share a denoiser and its network.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..frozen import Level, has_lean_layers
from .calling import NetworkCall
from .hooks import computes_in
from .module_copies import ModuleCopies, why_not_copied
from .networks import blocks_checkpointed, module_tree, without_weight_grad
from .run_conditions import RunConditions
from .trainable import refuse_uncopied

Given = dict[int, Tensor]
"""The tensors that stand for trained weights, by the `id` of the weight."""
_DTYPES = re.compile(r"\b(dtype|scalar type|[Ii]nput type)\b")


@dataclass(frozen=True)
class Variant:
    """How a network is called.

    Attributes:
        cast_to: The dtype that its weights are cast to, or None.
        checkpoints: Whether its blocks are checkpointed.
        lean: How little its graphs keep.
    """

    cast_to: torch.dtype | None = None
    checkpoints: bool = False
    lean: Level = Level.OFF


@dataclass(eq=False)
class ActiveCall:
    """One run, or one VJP, in one thread.

    Attributes:
        original: How the caller's own network is called.
        module: The module behind it.
        variant: What the run asked for.
        ending: What is done at the end of the run.
        call: How the run calls the network for a graph, once that is known.
        casts: Copies with cast weights, which are made at the first VJP of the run and freed at its end.
        given: The tensors that stood for the trained weights when the latest copies were made.
        given_to_casts: The same for each of the copies with cast weights.
        copies: The latest copies whose assignments the network is given at the end of the run.
        conditions: The conditions in the form that the network takes.
        own: The network's weights by `id`, once they are needed.
    """

    original: NetworkCall
    module: nn.Module
    variant: Variant
    ending: contextlib.ExitStack
    call: NetworkCall | None = None
    casts: dict[Variant, ModuleCopies] = field(default_factory=dict)
    conditions: RunConditions = field(default_factory=RunConditions)
    given: Given = field(default_factory=dict)
    given_to_casts: dict[Variant, Given] = field(default_factory=dict)
    copies: ModuleCopies | None = None
    own: dict[int, Tensor] = field(default_factory=dict)

    def calls(self, call: NetworkCall) -> bool:
        """Whether this run calls the same network in the same way."""
        return self.original.network is call.network and self.original.compiles == call.compiles

    def current(self, given: Given) -> NetworkCall:
        """Returns how the network is called now.

        Without grad mode nothing is kept for a gradient, so the caller's own network serves as well as a copy, unless
        it has other weights. But lean layers may round differently, so they are called in both cases, and torch.compile
        would compile the two one after the other.

        Args:
            given: The tensors that stand for the trained weights, by the `id` of the weight.
        """
        if self.call is None or not _same_tensors(given, self.given):
            plain = not torch.is_grad_enabled() and not self.original.compiles and self.variant.cast_to is None
            if plain and self._has_values_of(given) and not self._is_lean():
                return self.original
            self.call, self.given = self._call_for_graphs(given), dict(given)
        return self.call

    def _is_lean(self) -> bool:
        """Whether graphs are recorded by lean layers."""
        lean = has_lean_layers(self.module, self.variant.lean)
        return lean and why_not_copied(self.module, self.original.network) is None

    def _has_values_of(self, given: Given) -> bool:
        """Whether the network's trained weights are in the memory of the tensors that stand for them."""
        if not given:
            return True
        if not self.own:
            self.own = {id(weight): weight for weight in self.module.parameters()}
        pairs = [(self.own.get(key), tensor) for key, tensor in given.items()]
        return all(
            weight is not None and weight.data_ptr() == tensor.data_ptr() and weight.dtype == tensor.dtype
            for weight, tensor in pairs
        )

    def _call_for_graphs(self, given: Given) -> NetworkCall:
        """Makes copies of the network, unless it can be called itself."""
        if self.variant.cast_to is not None:
            return self.original.of(_cast_copies(self, given).of(self.original.network))
        as_it_is = not self.variant.checkpoints and not has_lean_layers(self.module, self.variant.lean) and not given
        if as_it_is and not _requires_grad(self.module) and computes_in(self.module) is None:
            return self.original
        if given:
            refuse_uncopied(self.module, self.original.network)
        if why_not_copied(self.module, self.original.network) is None:
            if self.copies is None:
                self.ending.callback(self._write_back)
            self._write_back()
            self.copies = copies = _copies(self.module, self.variant, given)
            return self.original.of(copies.of(self.original.network))
        self.ending.enter_context(without_weight_grad(self.module))
        if not self.variant.checkpoints:
            return self.original
        if self.original.compiles:
            self.ending.enter_context(blocks_checkpointed(self.module))
            return self.original
        # The flags are set for each call alone, because other evaluations of the run may keep whole graphs.
        return self.original.of(functools.partial(_with_blocks_checkpointed, self.module, self.original.network))

    def _write_back(self) -> None:
        """Gives the network what its own calls have assigned to attributes of the latest copies."""
        if self.copies is not None:
            self.copies.write_back()


def _with_blocks_checkpointed(module: nn.Module, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a network while the blocks of its module are checkpointed."""
    with blocks_checkpointed(module):
        return network(*args, **kwargs)


def _same_tensors(given: Given, before: Given) -> bool:
    """Whether the same tensors stand for the trained weights as before."""
    return len(given) == len(before) and all(before.get(key) is tensor for key, tensor in given.items())


def _requires_grad(module: nn.Module) -> bool:
    """Whether any of a network's weights requires grad."""
    return any(
        tensor is not None and tensor.requires_grad
        for inner in module_tree(module)
        for tensor in (*inner._parameters.values(), *inner._buffers.values())
    )


class _Thread(threading.local):
    """The runs of each thread that are under way, the innermost last."""

    def __init__(self) -> None:
        self.active: list[ActiveCall] = []


_THREAD = _Thread()


def active_call(call: NetworkCall, variant: Variant, given: Given) -> NetworkCall:
    """Returns how this thread calls a network: by the copies of the innermost run, or as it is outside of runs.

    Args:
        call: How the network is called.
        variant: How the run calls it.
        given: The tensors that stand for the trained weights, by the `id` of the weight.
    """
    active = active_run(call, variant)
    return call if active is None else active.current(given)


def active_conditions(call: NetworkCall, variant: Variant) -> RunConditions:
    """Returns what this thread's innermost run keeps of a network's conditions; something new outside of runs."""
    active = active_run(call, variant)
    return RunConditions() if active is None else active.conditions


def active_run(call: NetworkCall, variant: Variant) -> ActiveCall | None:
    """The innermost run of a network in this thread, or None."""
    return next((a for a in reversed(_THREAD.active) if a.calls(call) and a.variant == variant), None)


@contextlib.contextmanager
def calling_copies(call: NetworkCall, module: nn.Module, variant: Variant) -> Iterator[None]:
    """Lets `active_call` find copies of a network in this thread, for the length of the context.

    The weights of the copies do not require grad. Copies are made at the first call that records a graph, if that is to
    be lean, the network's weights require grad or its blocks are to be checkpointed; otherwise the network itself is
    called. It is also called where copies would not do what it does (see `why_not_copied`), with its flags set until
    the end of the context.

    Args:
        call: How the network is called.
        module: The module behind it.
        variant: How the copies differ from it. Weights can be cast in copies alone.
    """
    with contextlib.ExitStack() as ending:
        active = ActiveCall(call, module, variant, ending)
        _THREAD.active.append(active)
        try:
            yield
        finally:
            _THREAD.active.remove(active)
            for cast in active.casts.values():
                cast.write_back()
                cast.release()


def _cast_copies(active: ActiveCall, given: Given) -> ModuleCopies:
    """Returns copies with cast weights, which are kept by the run that is under way, or else by this call of it."""
    runs = (a for a in reversed(_THREAD.active) if a.calls(active.original) and a.variant.cast_to is None)
    owner = next(runs, active)
    found = owner.casts.get(active.variant)
    if found is None or not _same_tensors(given, owner.given_to_casts.get(active.variant, {})):
        if found is not None:
            found.write_back()
            found.release()
        found = owner.casts[active.variant] = _copies(active.module, active.variant, given)
        owner.given_to_casts[active.variant] = dict(given)
    return found


def _copies(module: nn.Module, variant: Variant, given: Given) -> ModuleCopies:
    """Makes copies that differ from a network as a variant says."""
    return ModuleCopies(module, variant.cast_to, checkpoints=variant.checkpoints, lean=variant.lean, trained=given)


@contextlib.contextmanager
def explain_cast(dtype: torch.dtype | None) -> Iterator[None]:
    """Says in an error about dtypes that it comes from a copy of the network whose weights are cast to `dtype`."""
    try:
        yield
    except RuntimeError as error:
        if dtype is None or not _DTYPES.search(str(error)):
            raise
        raise RuntimeError(
            f"vjp_dtype: the copy of the network with weights in {dtype}, of which VJPs are taken, failed: {error}. "
            "The network reaches some of its weights by a closure or another object, where they cannot be cast; use "
            "vjp_dtype=None"
        ) from error
