"""Numbers that the host reads from a device, many of them in one transfer.

A number that is read from a GPU makes the host wait until the GPU has done all that it was given before, and the GPU
has nothing to do while the host prepares the next kernels. Checks such as "is this finite" read one number each. Inside
`together()` they wait until numbers are read that the host needs to go on, and are done then, in their own order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Check = Callable[[list[float]], None]
"""Is given the numbers of a tensor in their order in memory, and raises if they are wrong."""


class Reads:
    """Checks of tensors that wait to be read."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Check]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, values: Tensor, check: Check) -> None:
        """Lets a check wait until `read` is called."""
        self._waiting.append((values.detach(), check))

    def forget(self, kept: int) -> None:
        """Leaves out all checks but the first ones."""
        del self._waiting[kept:]

    def read(self, values: Tensor | None = None) -> Any:
        """Reads what waits, and then does the checks.

        Args:
            values: A tensor that is read with the others.

        Returns:
            The numbers of `values`, nested as `Tensor.tolist` nests them; None without `values`.

        Raises:
            Exception: What the first check raises that fails.
        """
        waiting, self._waiting = self._waiting, []
        tensors = [tensor for tensor, _ in waiting]
        if values is not None:
            tensors.append(values.detach())
        numbers = _numbers(tensors)
        for (_, check), found in zip(waiting, numbers, strict=False):
            check(found)
        return None if values is None else _nested(iter(numbers[-1]), tuple(values.shape))


_current: ContextVar[Reads | None] = ContextVar("doodl_fast_host_reads", default=None)


def check_later(values: Tensor, check: Check) -> None:
    """Reads a tensor and checks its numbers: at once, or inside `together()` with others.

    Args:
        values: A tensor of any shape.
        check: Is given its numbers.
    """
    reads = _current.get()
    if reads is None:
        reads = Reads()
        reads.add(values, check)
        reads.read()
    else:
        reads.add(values, check)


@contextlib.contextmanager
def together() -> Iterator[Reads]:
    """Context manager: checks of `check_later` wait until `read` is called, or until the end of the outermost block.

    Blocks inside one another share what waits. If something raises inside a block, the checks that wait are done first,
    as what they find may be its cause. After torch.OutOfMemoryError those of the block are left out, since what ran out
    of memory may be tried again.
    """
    outer = _current.get()
    reads = Reads() if outer is None else outer
    before = len(reads)
    token = _current.set(reads)
    try:
        yield reads
        if outer is None:
            reads.read()
    except torch.OutOfMemoryError:
        reads.forget(before)
        raise
    except Exception as error:
        try:
            reads.read()
        except Exception as cause:
            raise cause from error
        raise
    finally:
        _current.reset(token)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Context manager: checks are done at once, whatever blocks this one is inside of."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def _numbers(tensors: list[Tensor]) -> list[list[float]]:
    """The numbers of each tensor, in one transfer for each device."""
    found: list[list[float]] = [[] for _ in tensors]
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        own = [number for number, tensor in enumerate(tensors) if tensor.device == device]
        # float64 holds every number of the narrower dtypes. Apple's GPUs do not have it.
        wide = torch.float32 if device.type == "mps" else torch.float64
        flat = iter(torch.cat([tensors[number].reshape(-1).to(wide) for number in own]).tolist())
        for number in own:
            found[number] = [next(flat) for _ in range(tensors[number].numel())]
    return found


def _nested(numbers: Iterator[float], shape: tuple[int, ...]) -> Any:
    """Numbers in lists of a shape."""
    return [_nested(numbers, shape[1:]) for _ in range(shape[0])] if shape else next(numbers)
