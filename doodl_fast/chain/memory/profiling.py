"""`doodl_fast.profile`: measures how much memory a chain's runs hold, and when.

This module has another name than the function, so that neither can hide the other.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chain import Chain, replaced_evaluator
from ..evaluator import Evaluator, Recordings, raw_output
from .plan import format_bytes
from .tracker import CudaMeter, Tracker, meter

POINTS = 2000
"""A figure or a file shows a timeline in this many spans of time, each with the most that was held in it."""


@dataclass(frozen=True)
class Evaluation:
    """The beginning of one evaluation of the network.

    Attributes:
        seconds: The time since the profile began.
        held: The bytes that were held.
        graph: Whether the evaluation had a graph.
    """

    seconds: float
    held: int
    graph: bool


@dataclass
class MemoryReport:
    """What happened inside `profile`. Bytes count from its beginning, and what was there before is not in them.

    Attributes:
        device: The device whose memory was counted.
        peak: The most bytes that were held at once.
        held: The bytes that were held at the end.
        seconds: The time on the clock; on the CPU it includes the tracker's own time.
        timeline: (seconds, bytes held), at every change on the CPU and at every evaluation on CUDA.
        evaluations: The evaluations of the network.
        now: Tells the bytes that are held now, inside the block.
    """

    device: str
    peak: int = 0
    held: int = 0
    seconds: float = 0.0
    timeline: list[tuple[float, int]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    now: Callable[[], int] = lambda: 0

    @property
    def growth(self) -> float:
        """By how many bytes each evaluation of the first forward run raised what is held.

        It is the slope of a line through all of them but the first, and 0 with fewer than three.
        """
        first = [e.held for e in self.evaluations[: self._forward()]][1:]
        if len(first) < 2:
            return 0.0
        middle = (len(first) - 1) / 2
        spread = sum((i - middle) ** 2 for i in range(len(first)))
        return sum((i - middle) * held for i, held in enumerate(first)) / spread

    def _forward(self) -> int:
        """How many evaluations come before the first that looks like a backward pass."""
        graphs = [e.graph for e in self.evaluations]
        if not graphs or graphs[0] or True not in graphs:
            return len(graphs)
        return graphs.index(True)

    def __str__(self) -> str:
        graphs = sum(e.graph for e in self.evaluations)
        rows = [
            ("peak", format_bytes(self.peak)),
            ("held at the end", format_bytes(self.held)),
            ("seconds", f"{self.seconds:.3g}"),
            ("evaluations", f"{len(self.evaluations)}, {graphs} of them with a graph"),
            ("growth in forward run", f"{format_bytes(self.growth)} an evaluation"),
        ]
        return "\n".join(f"{name:<24} {value}" for name, value in rows)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain numbers and lists, for JSON."""
        return {
            "device": self.device,
            "peak": self.peak,
            "held": self.held,
            "seconds": self.seconds,
            "growth": self.growth,
            "evaluations": [[e.seconds, e.held, e.graph] for e in self.evaluations],
            "timeline": thinned(self.timeline),
        }

    def save(self, folder: str | Path) -> None:
        """Writes timeline.png and profile.json.

        Args:
            folder: Where to; it is made if it is not there.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        draw_timelines(folder / "timeline.png", {"": self})


@contextlib.contextmanager
def profile(chain: Chain, device: str | torch.device | None = None) -> Iterator[MemoryReport]:
    """Measures the memory of everything that runs inside the block: the chain's passes, and whatever else runs there.

    On the CPU a tracker sees the results of every operator, which takes some time; scratch memory inside operators is
    not counted. On CUDA the allocator is asked, and its peak statistics are reset.

    Args:
        chain: The chain whose evaluations are noted.
        device: The device whose memory is counted. None: that of the chain's conditions, or else the CPU.

    Yields:
        The report. Its numbers are final after the block.

    Raises:
        TypeError: `chain` is no `Chain`.

    Example:
        with doodl_fast.profile(chain) as report:
            x0, y0 = chain(x)
            (x0.square().sum() + y0.square().sum()).backward()
        print(report)
    """
    if not isinstance(chain, Chain):
        raise TypeError(f"chain: expected a Chain such as EDICT, got {type(chain).__name__}")
    found = [t.device for t in chain.evaluator.tensors()]
    where = torch.device(device) if device is not None else found[0] if found else torch.device("cpu")
    inner = chain.evaluator
    seen: Tracker | CudaMeter = meter(where) if where.type == "cuda" else Tracker(where.type, record=True)
    report = MemoryReport(str(where), now=lambda: seen.held)
    with seen:
        began = time.perf_counter()

        def mark() -> None:
            seconds = time.perf_counter() - began
            report.evaluations.append(Evaluation(seconds, seen.held, torch.is_grad_enabled()))
            if not isinstance(seen, Tracker):
                report.timeline.append((seconds, seen.held))

        try:
            with replaced_evaluator(chain, _Marked(inner, mark)):
                yield report
        finally:
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            report.seconds = time.perf_counter() - began
            report.peak, report.held = seen.peak, seen.held
            if isinstance(seen, Tracker):
                report.timeline = seen.timeline or []


class _Marked(Evaluator):
    """Notes every call of another evaluator, and is like it in everything else."""

    def __init__(self, inner: Evaluator, mark: Callable[[], None]) -> None:
        self._inner, self._mark = inner, mark

    def __call__(
        self, x: Tensor, t: Any, tensors: Sequence[Tensor] | None = None, latents_dtype: torch.dtype | None = None
    ) -> Tensor:
        self._mark()
        return self._inner(x, t, tensors, latents_dtype)

    def raw(
        self, x: Tensor, t: Any, tensors: Sequence[Tensor] | None = None, latents_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, float | None]:
        self._mark()
        return raw_output(self._inner, x, t, tensors, latents_dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        return self._inner.tensors()

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        return self._inner.compute_dtype(latents_dtype)

    def running(self) -> contextlib.AbstractContextManager[None]:
        return self._inner.running()

    def for_vjp(self) -> Evaluator | None:
        return self._marked(self._inner.for_vjp())

    @property
    def insists_on_vjps(self) -> bool:
        return self._inner.insists_on_vjps

    def for_blocks(self) -> Evaluator | None:
        return self._marked(self._inner.for_blocks())

    def for_recompute(self) -> Evaluator | None:
        return self._marked(self._inner.for_recompute())

    def plain(self) -> Evaluator:
        return _Marked(self._inner.plain(), self._mark)

    def recordings(self, device: torch.device) -> Recordings | None:
        return self._inner.recordings(device)

    def launched(self) -> Evaluator:
        return _Marked(self._inner.launched(), self._mark)

    def weights(self) -> tuple[tuple[str, Tensor], ...]:
        return self._inner.weights()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # The inner evaluator is not there yet while an object is copied.
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __repr__(self) -> str:
        return repr(self._inner)

    def _marked(self, other: Evaluator | None) -> Evaluator | None:
        return None if other is None else _Marked(other, self._mark)


def thinned(timeline: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """A timeline in at most `POINTS` points. Its peak stays."""
    size = -(-len(timeline) // POINTS) or 1
    return [max(timeline[i : i + size], key=lambda point: point[1]) for i in range(0, len(timeline), size)]


def draw_timelines(path: Path, reports: dict[str, MemoryReport]) -> None:
    """Draws the bytes held against the share of the time, with one panel, and one scale, for each report.

    Args:
        path: The PNG file.
        reports: The reports by their labels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 1.1 * len(reports)), layout="constrained")
    panels = figure.subplots(len(reports), sharex=True, squeeze=False)[:, 0]
    for axes, (label, report) in zip(panels, reports.items(), strict=True):
        points = thinned(report.timeline)
        last = max((seconds for seconds, _ in points), default=1.0)
        axes.fill_between([100 * t / last for t, _ in points], [n / 2**20 for _, n in points], step="post")
        axes.set(xlim=(0, 100), ylim=(0, None), ylabel="MiB")
        axes.set_title(f"{label}: {format_bytes(report.peak)}".removeprefix(": "), fontsize="medium", loc="left")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("time of one gradient, per cent")
    figure.savefig(path, format="png", dpi=100)


def __getattr__(name: str) -> Any:
    if name == "Report":
        warnings.warn(
            "Report is now MemoryReport; the old name will go in version 0.3", DeprecationWarning, stacklevel=2
        )
        return MemoryReport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
