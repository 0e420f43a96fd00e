"""Keeps each sample's best picture so far, with the calls and the seconds that were spent until then."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .counting import Counter


class Meter:
    """Seconds and memory of a run: of the GPU on a CUDA device, and of the process's processor time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._resident = 0.0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._resident = _reset_peak()
        self._began = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._began

    def peak(self) -> float | None:
        """The peak in MiB: of PyTorch's memory on a GPU, or by how much the process grew. None if it is not known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        top = _status("VmHWM")
        return None if top is None else max(0.0, top - self._resident)


def _status(name: str) -> float | None:
    """A line of /proc/self/status in MiB; None where there is no such file."""
    try:
        with open("/proc/self/status") as file:
            return next((float(line.split()[1]) / 1024 for line in file if line.startswith(name)), None)
    except OSError:
        return None


def _reset_peak() -> float:
    """Sets the peak of this process's memory back to what it has now, and returns that in MiB."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return _status("VmRSS") or 0.0


class Trace:
    """What a run has found so far, for each sample of a batch.

    Args:
        counter: Counts the network's calls; it is reset.
        batch: How many samples there are.
        budget: How many calls each sample may cost.
        checkpoints: How often the best pictures so far are kept, in even parts of the budget.
        device: Where the run is computed.

    Attributes:
        kept: For each checkpoint (calls a sample, seconds, number of evaluations, best losses, pictures).
        first: The losses of the first evaluation.
        marks: The seconds and the calls at the end of each evaluation.
    """

    def __init__(self, counter: Counter, batch: int, budget: float, checkpoints: int, device: torch.device) -> None:
        counter.reset()
        self.counter, self.batch, self.budget, self.checkpoints = counter, batch, budget, checkpoints
        self.meter = Meter(device)
        self.kept: list[tuple[float, float, int, list[float], NDArray[np.uint8]]] = []
        self.first: list[float] = []
        self.marks: list[tuple[float, float]] = []
        self.forward = self.backward = 0.0
        self._best: tuple[Tensor, Tensor] | None = None

    def add(self, images: Tensor, losses: Tensor) -> bool:
        """Notes the pictures (B, 3, H, W) and the losses (B,) of an evaluation. Returns whether the budget is spent.

        It is spent when another evaluation, as costly as the first one, would exceed it.
        """
        images, losses = images.detach().as_subclass(Tensor), losses.detach()
        if self._best is None:
            self._best = images.clone(), losses.clone()
            self.first = losses.tolist()
        else:
            better = losses < self._best[1]
            self._best = (
                torch.where(better.view(-1, 1, 1, 1), images, self._best[0]),
                torch.where(better, losses, self._best[1]),
            )
        self.forward, self.backward = self.counter.forward / self.batch, self.counter.backward / self.batch
        spent = self.forward + self.backward
        self.marks.append((self.meter.seconds(), spent))
        done = spent + self.marks[0][1] > self.budget
        if done or spent >= self.budget * (len(self.kept) + 1) / self.checkpoints:
            # An evaluation may pass several checkpoints at once.
            self._keep(spent)
        return done

    def _keep(self, spent: float) -> None:
        assert self._best is not None
        pixels = ((self._best[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        self.kept.append((spent, self.marks[-1][0], len(self.marks), self._best[1].tolist(), pixels))

    def end(self) -> None:
        """Keeps what there is, where a method has ended before its first checkpoint."""
        if not self.kept:
            self._keep(self.marks[-1][1])

    def pace(self) -> float:
        """Seconds of one evaluation: the median, so that what happens once, such as recording CUDA graphs, is left out.

        The first evaluation is left out too if there are others.
        """
        ends = [0.0, *(seconds for seconds, _ in self.marks)]
        each = [after - before for before, after in itertools.pairwise(ends)]
        return float(np.median(each[1:] or each))

    def as_dict(self) -> dict[str, Any]:
        """What a result file has of the whole batch."""
        return {
            "forward": self.forward,
            "backward": self.backward,
            "evaluations": len(self.marks),
            "seconds": self.marks[-1][0],
            "pace": self.pace(),
            "peak": self.meter.peak(),
        }
