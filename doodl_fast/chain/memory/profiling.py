"""`with doodl_fast.profile(chain) as report:` what a chain's runs hold, take and grow by."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chain import Chain, replaced_evaluator
from ..evaluator import Evaluator, raw_output
from .plan import format_bytes
from .tracker import CudaMeter, Tracker, meter

POINTS = 2000
"""Of a timeline, in a figure or a file: the most that was held in each of so many spans of time."""


@dataclass(frozen=True)
class Evaluation:
    """The beginning of one evaluation of the network: seconds since the profile began, bytes held, with a graph?"""

    seconds: float
    held: int
    graph: bool


@dataclass
class Report:
    """What happened inside `profile`. Bytes count from its beginning.

    peak: most bytes at once. held: bytes at the end. seconds: on the clock; the tracker's own time is in it on the CPU.
    timeline: (seconds, bytes held), at every change on the CPU, at every evaluation on CUDA. evaluations: each one.
    """

    device: str
    peak: int = 0
    held: int = 0
    seconds: float = 0.0
    timeline: list[tuple[float, int]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    now: Callable[[], int] = lambda: 0
    """Bytes held now, inside the block."""

    @property
    def growth(self) -> float:
        """Bytes by which each evaluation of the first forward run, the first excepted, raised what is held: the slope
        of a line through them. 0 with fewer than three."""
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
        """For JSON."""
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
        """Writes timeline.png and profile.json into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        draw_timelines(folder / "timeline.png", {"": self})


@contextlib.contextmanager
def profile(chain: Chain, device: str | torch.device | None = None) -> Iterator[Report]:
    """Measures all that is run inside: the chain's forward and backward passes, and what else is.

        with doodl_fast.profile(chain) as report:
            x0, y0 = chain(x)
            (x0.square().sum() + y0.square().sum()).backward()
        print(report)

    device: whose memory is counted; default: that of the chain's conditions, else the CPU. On the CPU a tracker sees
    every operator's results (scratch memory inside operators is not counted), at some cost in time; on CUDA the caching
    allocator is asked, and its peak statistics are reset. Raises TypeError for anything but a `Chain`.
    """
    if not isinstance(chain, Chain):
        raise TypeError(f"chain: expected a Chain such as EDICT, got {type(chain).__name__}")
    found = [t.device for t in chain.evaluator.tensors()]
    where = torch.device(device) if device is not None else found[0] if found else torch.device("cpu")
    inner = chain.evaluator
    seen: Tracker | CudaMeter = meter(where) if where.type == "cuda" else Tracker(where.type, record=True)
    report = Report(str(where), now=lambda: seen.held)
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
    """An evaluator whose calls are noted; all else is the inner one's."""

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
    """A timeline in at most so many points; its peak stays."""
    size = -(-len(timeline) // POINTS) or 1
    return [max(timeline[i : i + size], key=lambda point: point[1]) for i in range(0, len(timeline), size)]


def draw_timelines(path: Path, reports: dict[str, Report]) -> None:
    """Bytes held against the share of the time, one panel a report, each with an axis of its own."""
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
