"""Counts the bytes of live tensors, by watching every operator that makes one."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OverLimit(Exception):
    """More is alive than a tracker allows."""


class Tracker(TorchDispatchMode):
    """`with Tracker() as tracker:` counts the storages that operators make inside, until each is freed.

    device: counts that type of device alone ("cpu", "cuda", "meta"); None: all.
    record: keeps `timeline`, (seconds since it was made, bytes held) after every change.
    limit: more bytes than that at once raise `OverLimit` from the operator that made them.

    held: bytes now, also after the block as what it made is freed. peak: the most so far; `reset_peak` forgets it. A
    storage counts once however many views it has, and not at all if it was there before. Operators' own scratch memory
    is not seen. Backward passes inside the block are, as are meta tensors, which hold nothing.
    """

    def __init__(self, device: str | None = None, record: bool = False, limit: int | None = None) -> None:
        super().__init__()
        self.device, self.limit, self.held, self.peak = device, limit, 0, 0
        self.timeline: list[tuple[float, int]] | None = [] if record else None
        self._sizes: dict[int, int] = {}
        self._began = time.perf_counter()

    def reset_peak(self) -> None:
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs:
            given = {storage._cdata for storage in _storages(tree_leaves((args, kwargs)))}
            for storage in _storages(outputs):
                if self.device is None or storage.device.type == self.device:
                    self._see(storage, storage._cdata in given)
            if self.limit is not None and self.held > self.limit:
                raise OverLimit
        return result

    def _see(self, storage: torch.UntypedStorage, given: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            if given or not size:
                return
            free: Callable[[int], None] = self._free
            weakref.finalize(storage, free, key).atexit = False
        elif known == size:
            return
        self._sizes[key] = size
        self._change(size - (known or 0))

    def _free(self, key: int) -> None:
        self._change(-self._sizes.pop(key))

    def _change(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)
        if self.timeline is not None:
            self.timeline.append((time.perf_counter() - self._began, self.held))


def _storages(values: list[Any]) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in values if isinstance(v, Tensor) and v.layout == torch.strided]


class CudaMeter:
    """What `Tracker` counts, as the CUDA caching allocator counts it: scratch memory of operators included.

    Resets the device's peak statistics (`torch.cuda.max_memory_allocated`).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> CudaMeter:
        self._base = torch.cuda.memory_allocated(self._device)
        self.reset_peak()
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to undo: allocations are counted by the allocator whether or not anyone asks."""

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._base

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._base


def meter(device: torch.device) -> Tracker | CudaMeter:
    """What measures memory on a device: a context manager with `held`, `peak` and `reset_peak`."""
    return CudaMeter(device) if device.type == "cuda" else Tracker(device.type)
