"""Decoders and guides that take less memory, for optimisations whose chain has memory="auto".

A decoder or guide may have `leaner()`: the same function with less memory and more to compute again, None after the
last. Such steps are worth far less time than the chain's: a gradient decodes twice and runs the network some hundred
times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chain.memory.plan import Plan, free_bytes
from ..chain.memory.planner import release
from ..chain.memory.tracker import OverLimit, Tracker, meter
from . import checkpoint as runstate

Function = Callable[[Tensor], Tensor]
Pair = tuple[Function, Function]


def leaner(decode: Function, loss: Function) -> Pair | None:
    """The next leaner pair, the decoder first; None if neither has more to give."""
    for index, function in enumerate((decode, loss)):
        method = getattr(function, "leaner", None)
        other = None if method is None else method()
        if other is not None:
            return (other, loss) if index == 0 else (decode, other)
    return None


def fitted(chain: Any, decode: Function, loss: Function, latents: Tensor, dtype: torch.dtype) -> Pair:
    """The pair with which a chain of memory="auto" has least to compute again; the chain is told what it takes.

    latents: (B, C, ...) as the chain will get them; they are decoded in `dtype`. The first pair that costs the chain
    nothing is taken, else the best. Other chains get the pair as it is. Measuring decodes and scores once a pair, and
    leaves random states alone.
    Raises ValueError, naming the smallest possible budget.
    """
    if getattr(chain, "planner", None) is None:
        return decode, loss
    free, limit = chain.make_plan(latents, 0), chain.memory_budget or free_bytes(latents.device)
    pair: Pair | None = (decode, loss)
    best: tuple[Plan, int, Pair] | None = None
    while pair is not None and (best is None or best[0].recomputed > free.recomputed):
        after = leaner(*pair)
        taken = reserve(*pair, latents.to(dtype), limit if best is not None or after is not None else None)
        try:
            plan = None if taken is None else chain.make_plan(latents, taken)
        except ValueError:
            if after is None and best is None:
                raise
            plan = None
        if plan is not None and taken is not None and (best is None or plan.recomputed < best[0].recomputed):
            best = plan, taken, pair
        pair = after
    assert best is not None
    chain.make_plan(latents, best[1])
    return best[2]


def reserve(decode: Function, loss: Function, latents: Tensor, limit: int | None) -> int | None:
    """Most bytes that are alive while latents are decoded, scored and pulled back in an optimisation; None where that
    is over the limit or ran out of memory."""
    random = runstate.random_state()
    try:
        with torch.enable_grad(), Tracker(latents.device.type, limit=limit), meter(latents.device) as seen:
            leaf = latents.detach().requires_grad_()
            image = decode(leaf)
            torch.autograd.grad(loss(image), leaf)
            # beside this image: the other member's, and both of the step before
            return seen.peak + 3 * image.numel() * image.element_size()
    except (torch.OutOfMemoryError, OverLimit):
        pass
    finally:
        runstate.restore_random_state(random)
    release(latents.device)
    return None
