"""Runs the comparison chunk by chunk. A chunk that is done is one file, so the whole goes on where it was stopped."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import doodl_fast
from doodl_fast import shapes
from doodl_fast.sweep.files import remove_partial, write_json

from . import guides, tasks
from .counting import Counter, CountingDenoiser
from .methods import METHODS, Batch
from .trace import Trace

SETTING = "setting.json"


@dataclass(frozen=True)
class Setting:
    """What decides the results, beside the device.

    Attributes:
        prompts: Prompts of the test split, for each task.
        seeds: Seeds of each.
        tune_prompts: Prompts of the split for tuning.
        tune_seeds: Seeds of each.
        trials: How many scales every method tries.
        budget: Network calls for each picture.
        checkpoints: How often the best pictures so far are judged, in even parts of the budget.
        drawn: How many scenes the aesthetic head is trained on.
        tasks: The tasks, in their order.
        methods: The methods, in their order.
    """

    prompts: int = 40
    seeds: int = 4
    tune_prompts: int = 16
    tune_seeds: int = 2
    trials: int = 5
    budget: int = 600
    checkpoints: int = 5
    drawn: int = 1200
    tasks: tuple[str, ...] = tasks.TASKS
    methods: tuple[str, ...] = tuple(METHODS)

    def as_dict(self) -> dict[str, Any]:
        """The setting as JSON has it."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


QUICK = Setting(prompts=4, seeds=2, tune_prompts=2, tune_seeds=1, trials=2, budget=120, checkpoints=2, drawn=300)


@dataclass(frozen=True)
class Item:
    """One sample of a run: what it is to show, its seed, and the scale that the method uses."""

    case: tasks.Case
    seed: int
    scale: float


class Judge:
    """Judges pictures on the CPU, in other processes if there are workers.

    Args:
        workers: How many processes; 0 for this one.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers else None

    def __call__(self, pictures: np.ndarray, cases: Sequence[tasks.Case]) -> list[dict[str, Any]]:
        """The judgement of each picture of (N, 64, 64, 3)."""
        work = list(zip(pictures, cases, strict=True))
        if self._pool is None:
            return tasks.judge_all(work)
        size = -(-len(work) // self.workers)
        parts = self._pool.map(tasks.judge_all, [work[i : i + size] for i in range(0, len(work), size)])
        return [one for part in parts for one in part]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class Runner:
    """Runs what is missing in a folder.

    Args:
        out: The folder.
        setting: What is run.
        device: Where.
        chunk: The most samples of one batch; prompts are not divided.
        workers: Of `Judge`.
        options: Those of the command, which the report repeats.
        deadline: The moment of `time.monotonic` after which no chunk is begun; None for none.
        share: (i, n) for a process that does each n-th task, from the i-th on, beside n - 1 others.

    Raises:
        ValueError: The folder holds results of another setting.
    """

    def __init__(
        self,
        out: Path,
        setting: Setting,
        device: str,
        chunk: int,
        workers: int = 0,
        options: str = "",
        deadline: float | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.out, self.setting, self.device, self.chunk = out, setting, torch.device(device), chunk
        self.options, self.deadline, self.share = options, deadline, share
        out.mkdir(parents=True, exist_ok=True)
        for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
            remove_partial(folder, older_than=60)
        head, about = guides.train_head(shapes.load_clip("cpu"), setting.drawn)
        self._check_setting(about)
        self.pipe = shapes.load_pipeline(self.device)
        self.guides = guides.Guides(self.device, head)
        self.judge = Judge(workers)
        self.counter = Counter()
        self._denoisers: dict[tuple[str, ...], CountingDenoiser] = {}

    def _check_setting(self, about: dict[str, float]) -> None:
        path = self.out / SETTING
        own = self.setting.as_dict()
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["setting"] != own:
                names = [name for name, value in own.items() if stored["setting"].get(name) != value]
                raise ValueError(
                    f"--out: {str(self.out)!r} has results of another setting ({', '.join(names)} differ); pass "
                    "another folder"
                )
            return
        write_json(path, {"setting": own, "head": about, "machine": self._machine(), "options": self.options})

    def _machine(self) -> dict[str, Any]:
        """Where and by which versions the runs are computed."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "doodl_fast": doodl_fast.__version__,
            "threads": torch.get_num_threads(),
        }

    def run(self) -> bool:
        """Runs all chunks that are missing. Returns whether the folder is complete."""
        try:
            for task in self.setting.tasks[self.share[0] :: self.share[1]]:
                for split in tasks.SPLITS:
                    for method in self.setting.methods:
                        for number, items in enumerate(self._chunks(task, method, split)):
                            if not self._chunk(task, method, split, number, items):
                                return False
        finally:
            self.judge.close()
        return True

    def _chunks(self, task: str, method: str, split: str) -> Iterator[list[Item]]:
        """The chunks of a method's run on a split: of the test split with the scale that tuning has chosen."""
        s = self.setting
        scales = spread(METHODS[method].scales, s.trials)
        if split == "tune":
            found = [
                [Item(case, seed, scale) for seed in range(1000, 1000 + s.tune_seeds)]
                for scale in scales
                for case in tasks.cases(task, split, s.tune_prompts)
            ]
        else:
            scale = chosen_scale(self.out, task, method) if scales else 0.0
            found = [
                [Item(case, seed, scale) for seed in range(s.seeds)] for case in tasks.cases(task, split, s.prompts)
            ]
        each = max(1, self.chunk // max(1, len(found[0]) if found else 1))
        for first in range(0, len(found), each):
            yield [item for group in found[first : first + each] for item in group]

    def _chunk(self, task: str, method: str, split: str, number: int, items: list[Item]) -> bool:
        """Runs one chunk, unless it is done. Returns False if there is no time for it."""
        path = self.out / task / method / f"{split}-{number:03d}.json"
        if path.exists():
            return True
        if self.deadline is not None and time.monotonic() > self.deadline:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        found = self._result(method, items)
        write_json(path, {"task": task, "method": method, "split": split, "machine": self._machine(), **found})
        rate = np.mean([row["success"][-1] for row in found["rows"]])
        calls = found["forward"] + found["backward"]
        print(
            f"{task} {method} {split} {number}: {len(items)} samples, {rate:.0%} right, {calls:g} calls each, "
            f"{found['seconds']:.1f} s, {time.monotonic() - began:.1f} s in all",
            flush=True,
        )
        return True

    def _batch(self, items: list[Item]) -> Batch:
        cases = [item.case for item in items]
        texts = tuple(case.prompt for case in cases)
        if texts not in self._denoisers:
            # Methods on the same prompts share a denoiser, whose calls are recorded once as CUDA graphs.
            own = doodl_fast.DDIM.from_pipeline(self.pipe, list(texts), num_inference_steps=2).denoiser
            self._denoisers.clear()
            self._denoisers[texts] = CountingDenoiser(self.counter, own.unet, own.cond, own.uncond, 1.0)
        rates = torch.tensor([item.scale for item in items], dtype=torch.float32).to(self.device)
        seeds, values = [item.seed for item in items], self.guides.of(cases)
        return Batch(self.pipe, cases, seeds, rates, values, self.counter, self._denoisers[texts])

    def _result(self, method: str, items: list[Item]) -> dict[str, Any]:
        """Runs a method, judges its pictures, and compares them with those that nothing guides."""
        batch = self._batch(items)
        plain = Trace(self.counter, len(items), 1, 1, self.device)
        METHODS["none"].run(batch, plain)
        trace = Trace(self.counter, len(items), self.setting.budget, self.setting.checkpoints, self.device)
        METHODS[method].run(batch, trace)
        trace.end()
        about = trace.as_dict()
        verdicts = self.judge(np.concatenate([kept[4] for kept in trace.kept]), batch.cases * len(trace.kept))
        pictures, before = trace.kept[-1][4], plain.kept[-1][4]
        rows = []
        for index, item in enumerate(items):
            own = [verdicts[index + k * len(items)] for k in range(len(trace.kept))]
            same = [i for i, other in enumerate(items) if (other.case, other.scale) == (item.case, item.scale)]
            apart = [_apart(pictures[index], pictures[i]) for i in same if i != index]
            rows.append(
                {
                    "prompt": item.case.prompt,
                    "variety": item.case.variety,
                    "seed": item.seed,
                    "scale": item.scale,
                    "first": round(trace.first[index], 6),
                    "loss": [round(kept[3][index], 6) for kept in trace.kept],
                    **{name: [round(one[name], 4) for one in own] for name in ("success", "score", "shows")},
                    "distance": round(_apart(pictures[index], before[index]), 5),
                    "diversity": round(float(np.mean(apart)), 5) if apart else None,
                }
            )
        spent = [{"calls": k[0], "seconds": k[1], "evaluations": k[2]} for k in trace.kept]
        graphs = batch.denoiser.cuda_graphs.why_not or "replayed"
        return {**about, "cuda_graphs": graphs, "samples": len(items), "checkpoints": spent, "rows": rows}


def spread(scales: Sequence[float], trials: int) -> list[float]:
    """So many of a method's scales, evenly spread over them, the lowest and the highest included."""
    if not scales:
        return []
    return [scales[int(i)] for i in dict.fromkeys(np.linspace(0, len(scales) - 1, trials).round())]


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """The root mean square difference of two pictures, of pixels from 0 to 1."""
    return float(np.sqrt((((a.astype(float) - b) / 255) ** 2).mean()))


def read_chunks(out: Path, task: str, method: str, split: str) -> list[dict[str, Any]]:
    """The chunks of a split that are done, in their order."""
    return [json.loads(path.read_text()) for path in sorted((out / task / method).glob(f"{split}-*.json"))]


def tuning(out: Path, task: str, method: str) -> list[dict[str, float]]:
    """For each scale that was tried the mean score by the judge, the success and the guide's loss."""
    rows = [row for chunk in read_chunks(out, task, method, "tune") for row in chunk["rows"]]
    found = []
    for scale in dict.fromkeys(row["scale"] for row in rows):
        own = [row for row in rows if row["scale"] == scale]
        means = {name: float(np.mean([row[name][-1] for row in own])) for name in ("score", "success", "loss")}
        found.append({"scale": scale, **means, "samples": len(own)})
    return found


def chosen_scale(out: Path, task: str, method: str) -> float:
    """The scale with the best mean by the judge on the split for tuning; of equal ones that with the lowest loss."""
    best = tasks.TUNED_BY[task]
    return max(tuning(out, task, method), key=lambda one: (round(one[best], 6), -one["loss"]))["scale"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what libraries say of loading models out of the output."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    yield
