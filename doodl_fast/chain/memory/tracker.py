"""Counts the bytes of live tensors: by watching every operator, or by asking the CUDA allocator."""

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
    """More bytes are alive than a tracker's limit allows."""


class Tracker(TorchDispatchMode):
    """Counts, inside a `with` block, the bytes of the storages that operators make, until each is freed.

    A storage counts once however many views it has, and not at all if it was there before the block. Backward passes
    inside the block are seen, and so are meta tensors, which hold nothing. The scratch memory of operators is not seen.

    Args:
        device: The type of device that is counted ("cpu", "cuda" or "meta"); None counts all.
        record: Whether to keep `timeline`.
        limit: If more bytes than this are alive at once, the operator that made the last of them raises `OverLimit`.

    Attributes:
        held: The bytes that are alive now. After the block it goes on falling as they are freed.
        peak: The most bytes that were alive at once.
        flops: The floating-point operations of matrix products, convolutions and fused attention so far.
        timeline: (seconds since the tracker was made, bytes held), after every change; None unless it is recorded.

    Example:
        with Tracker("cpu") as tracker:
            loss(x).backward()
        print(tracker.peak)
    """

    def __init__(self, device: str | None = None, record: bool = False, limit: int | None = None) -> None:
        from torch.utils.flop_counter import flop_registry  # It imports triton, which takes longer than all of this.

        super().__init__()
        self.device, self.limit, self.held, self.peak = device, limit, 0, 0
        self.flops = 0
        self._counts: Any = flop_registry
        self.timeline: list[tuple[float, int]] | None = [] if record else None
        self._sizes: dict[int, int] = {}
        self._began = time.perf_counter()

    def reset_peak(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = self._counts.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
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
        """Counts a storage that an operator returned, unless it is known or was among the operator's arguments."""
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
        """Takes a freed storage off the count."""
        self._change(-self._sizes.pop(key))

    def _change(self, size: int) -> None:
        """Adds bytes to the count."""
        self.held += size
        self.peak = max(self.peak, self.held)
        if self.timeline is not None:
            self.timeline.append((time.perf_counter() - self._began, self.held))


def _storages(values: list[Any]) -> list[torch.UntypedStorage]:
    """The storages of the tensors among some values."""
    return [v.untyped_storage() for v in values if isinstance(v, Tensor) and v.layout == torch.strided]


class CudaMeter:
    """Counts what `Tracker` counts, but as PyTorch's CUDA allocator sees it: with the scratch memory of operators.

    It resets the device's peak statistics (`torch.cuda.max_memory_allocated`).

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> CudaMeter:
        self._base = torch.cuda.memory_allocated(self._device)
        self.reset_peak()
        return self

    def __exit__(self, *error: object) -> None:
        """There is nothing to undo, as the allocator counts in any case."""

    def reset_peak(self) -> None:
        """Forgets the peak so far."""
        torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def held(self) -> int:
        """The bytes that are alive now, beyond those at the block's beginning."""
        return torch.cuda.memory_allocated(self._device) - self._base

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once, beyond those at the block's beginning."""
        return torch.cuda.max_memory_allocated(self._device) - self._base


def meter(device: torch.device) -> Tracker | CudaMeter:
    """What measures memory on a device: a context manager with `held`, `peak` and `reset_peak`."""
    return CudaMeter(device) if device.type == "cuda" else Tracker(device.type)
