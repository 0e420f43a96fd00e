"""How the kernels of a function are recorded once and launched again: by CUDA graphs.

A CUDA graph is a recording of kernels and of the addresses that they read and write. Replaying it launches all of them
by one call, without the Python code and the launches of the recorded function (docs.nvidia.com, CUDA C++ Programming
Guide, "CUDA Graphs"; `torch.cuda.CUDAGraph`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

WARM_UP = 3
"""How often a function is called before it is recorded, for libraries that choose kernels and allocate at first calls;
the number is that of `torch.cuda.make_graphed_callables`."""


class Recorder(ABC):
    """Records functions on one device.

    All its recordings work on the same memory, so a replay invalidates what the others have left there.

    Args:
        device: The device.
    """

    device_type: ClassVar[str]
    """The type of the devices on which it can record."""

    @abstractmethod
    def __init__(self, device: torch.device) -> None: ...

    @abstractmethod
    def warm_up(self, function: Callable[[], Any]) -> None:
        """Calls a function a few times in the way in which it is recorded."""

    @abstractmethod
    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Records the kernels of a function.

        Returns:
            A function that launches them again, and what the recorded function returned: tensors that every replay
            writes anew.
        """

    @abstractmethod
    def seconds(self, function: Callable[[], Any]) -> float:
        """The seconds from the call of a function to the end of its kernels."""


class CudaRecorder(Recorder):
    """Records on a side stream of a CUDA device, and keeps the memory of all recordings in one pool."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Any]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with work of their own.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs

    def seconds(self, function: Callable[[], Any]) -> float:
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        function()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - began
