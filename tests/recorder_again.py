"""A stand-in for CUDA graphs that runs the recorded functions again.

Like a graph it writes into the tensors of the recording, and what a replay left for a gradient is gone after the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from doodl_fast.diffusion.cuda_graphs import CudaGraphs
from doodl_fast.diffusion.graph_recorder import Recorder


class Again(Recorder):
    """Runs functions again in place of replaying their kernels."""

    device_type = "cpu"
    made = 0
    replay_seconds = 0.1

    def __init__(self, device: torch.device) -> None:
        self._saved: dict[int, torch.Tensor] = {}
        self._timed = 0

    def warm_up(self, function: Any) -> None:
        function()

    def record(self, function: Any) -> tuple[Any, Any]:
        type(self).made += 1
        made = self._watched(function)
        outputs = tuple(map(_owned, made)) if isinstance(made, tuple) else made

        def replay() -> None:
            new = self._watched(function)
            pairs = zip(outputs, new, strict=True) if isinstance(outputs, tuple) else [(outputs, new)]
            with torch.no_grad():
                for output, value in pairs:
                    if output is not None:
                        output.copy_(value)

        return replay, outputs

    def _watched(self, function: Any) -> Any:
        """Calls a function. What the graphs of earlier calls have saved is gone if this one saves something."""
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> tuple[dict[int, torch.Tensor], int]:
            if self._saved is not saved:
                self._saved.clear()
                self._saved = saved
            saved[len(saved)] = tensor
            return saved, len(saved) - 1

        with saved_tensors_hooks(pack, lambda packed: packed[0][packed[1]]):
            return function()

    def seconds(self, function: Any) -> float:
        self._timed += 1
        return 1.0 if self._timed % 4 in (1, 2) else self.replay_seconds


def _owned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor with memory of its own for each element, into which a replay can write."""
    return None if tensor is None else tensor.clone(memory_format=torch.contiguous_format)


def with_recordings(chain: Any, mode: bool | str = True) -> Any:
    """Lets a chain's denoiser record by the stand-in."""
    chain.evaluator._cuda_graphs = CudaGraphs(mode, Again)
    return chain
