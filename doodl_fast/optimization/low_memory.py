"""Versions of decoders and guides that need less memory, for optimisations whose chain has memory="auto".

A decoder or guide may have a method `leaner()`. It returns the same function with less memory and more to compute
again, or None if there is no such version. This costs far less time than it costs the chain to save the same memory: a
gradient decodes two images and calls the network some hundred times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chain.memory.plan import Plan, free_bytes
from ..chain.memory.planner import release
from ..chain.memory.tracker import OverLimit, Tracker, meter
from .checkpoint import random_state, restore_random_state
from .losses import Losses

WORTHWHILE = 1
"""How many evaluations of its network a chain has to be spared for a decoder or a guide that computes more again."""
Function = Callable[[Tensor], Tensor]
Pair = tuple[Function, Function]


def next_smaller(decode: Function, loss: Function) -> Pair | None:
    """Decoder and loss with one of them, the decoder if it can be, in its next smaller version; None if neither can."""
    for index, function in enumerate((decode, loss)):
        method = getattr(function, "leaner", None)
        other = None if method is None else method()
        if other is not None:
            return (other, loss) if index == 0 else (decode, other)
    return None


def fit_to_budget(chain: Any, decode: Function, loss: Function, latents: Tensor, dtype: torch.dtype) -> Pair:
    """The versions of decoder and loss with which a chain of memory="auto" has least to compute again.

    The first pair that costs the chain less than an evaluation of its network is taken, or else the best of all. The
    chain's plan is then made for the memory that the chosen pair takes. Each pair is measured by one gradient. Random
    states are left as they were.

    Args:
        chain: Other chains than those with memory="auto" get the pair as it is.
        decode: Final latents (B, C, ...) -> images.
        loss: Images -> scalar.
        latents: (B, C, ...), as the chain will get them.
        dtype: The dtype in which they are decoded.

    Raises:
        ValueError: The budget is too small. The error names the smallest possible one.
    """
    if getattr(chain, "planner", None) is None:
        return decode, loss
    free, limit = chain.make_plan(latents, 0), chain.memory_budget or free_bytes(latents.device)
    pair: Pair | None = (decode, loss)
    best: tuple[Plan, int, Pair] | None = None
    while pair is not None and (best is None or best[0].recomputed >= free.recomputed + WORTHWHILE):
        after = next_smaller(*pair)
        taken = peak_bytes(*pair, latents.to(dtype), limit if best is not None or after is not None else None)
        try:
            plan = None if taken is None else chain.make_plan(latents, taken)
        except ValueError:
            if after is None and best is None:
                raise
            plan = None
        if (
            plan is not None
            and taken is not None
            and (best is None or plan.recomputed <= best[0].recomputed - WORTHWHILE)
        ):
            best = plan, taken, pair
        pair = after
    assert best is not None
    chain.make_plan(latents, best[1])
    return best[2]


def peak_bytes(decode: Function, loss: Function, latents: Tensor, limit: int | None) -> int | None:
    """The most bytes that are alive while latents are decoded, scored and differentiated in an optimisation.

    Args:
        decode: Final latents (B, C, ...) -> images.
        loss: Images -> scalar.
        latents: (B, C, ...), in the dtype in which they are decoded.
        limit: In bytes; None for no limit.

    Returns:
        None if that is more than the limit, or if memory ran out.
    """
    random = random_state()
    try:
        with torch.enable_grad(), Tracker(latents.device.type, limit=limit), meter(latents.device) as seen:
            leaf = latents.detach().requires_grad_()
            if isinstance(loss, Losses):
                loss = loss.with_given(latents=leaf, start=latents.detach())
            image = decode(leaf)
            torch.autograd.grad(loss(image), leaf)
            # beside this image: that of the other member, and both of the step before
            return seen.peak + 3 * image.numel() * image.element_size()
    except (torch.OutOfMemoryError, OverLimit):
        pass
    finally:
        restore_random_state(random)
    release(latents.device)
    return None
