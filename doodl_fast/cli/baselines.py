"""Ways of taking one gradient through EDICT, ours and others', for the profile command to measure side by side."""

from __future__ import annotations

import ast
import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..chain.program import Coupling, Program
from ..chain.walk import walk_plainly
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import Schedule
from ..solvers.edict import EDICT

NAIVE, PER_STEP, REFERENCE = "naive", "checkpoint", "reference"
LAYERS = {
    "helper_functions.py": ("get_alpha_and_beta", "forward_step", "reverse_step"),
    "doodl.py": ("SteppingLayer", "MixingLayer"),
}
Pair = tuple[Tensor, Tensor]
OURS: dict[str, dict[str, Any]] = {
    "sources": {"memory": "checkpoint"},
    "exact reversal": {"memory": "reversible", "arithmetic": "exact"},
    "auto": {"memory": "auto"},
    "auto, smallest": {"memory": "auto"},
}


@dataclass(frozen=True)
class Setting:
    """What all contenders share: a model with its prompt, and a start x (B, C, h, w)."""

    denoiser: Denoiser
    scheduler: Any
    mix_weight: float
    x: Tensor
    memory_budget: str | None = None

    def chain(self, steps: int, **options: Any) -> EDICT:
        return EDICT(self.denoiser, Schedule.from_scheduler(self.scheduler, steps), self.mix_weight, **options)


Forward = Callable[[Tensor], Pair]
"""From a start that requires grad to (x0, y0)."""


def make(name: str, setting: Setting, steps: int) -> Forward:
    """A contender by name: one of OURS, "naive", "checkpoint" or "reference=DIR"."""
    if name in OURS:
        options = dict(OURS[name])
        if name == "auto, smallest":
            options["memory_budget"] = setting.chain(steps, **options).smallest_plan(setting.x).peak
        elif name == "auto":
            options["memory_budget"] = setting.memory_budget
        return setting.chain(steps, **options)
    if name == NAIVE:
        return setting.chain(steps, memory="naive")
    if name == PER_STEP:
        return _PerStep(setting.chain(steps))
    return reference(name.removeprefix(REFERENCE + "="), setting, steps)


def label(name: str) -> str:
    """A contender's name in a figure."""
    return {NAIVE: "naive backpropagation", PER_STEP: "checkpointed steps"}.get(name, name.partition("=")[0])


class _PerStep:
    """Every EDICT step under `torch.utils.checkpoint`, in plain torch, weights frozen, as a careful user has it."""

    def __init__(self, chain: EDICT) -> None:
        self.chain = chain

    def __call__(self, x: Tensor) -> Pair:
        dtype = self.chain.state_dtype or torch.float64
        state = (x.to(dtype), x.to(dtype))
        for _, couplings in groupby(self.chain.program, key=lambda coupling: coupling.step):
            state = checkpoint(self._step, tuple(couplings), x.dtype, *state, use_reentrant=False)
        return state[0].to(x.dtype), state[1].to(x.dtype)

    def _step(self, couplings: Program, dtype: torch.dtype, *state: Tensor) -> Pair:
        values = list(state)

        def evaluate(coupling: Coupling, source: Tensor) -> Tensor:
            return self.chain.evaluator(source, coupling.tag, None, dtype)

        with self.chain.evaluator.running():
            for _ in walk_plainly(couplings, values, evaluate):
                pass
        return values[0], values[1]


def reference(folder: str, setting: Setting, steps: int) -> Forward:
    """The layers of a checkout of the public DOODL code (arXiv 2303.13703), strung together as its `gen()` does.

    They run on the caller's UNet, in its dtype, on one image. Of the checkout only the definitions named in LAYERS are
    executed, as its modules load models from the hub when they are imported. Raises ValueError if it lacks them or
    memcnn, which wraps them, is not installed.
    """
    if len(setting.x) != 1:
        raise ValueError(f"--against: the reference takes one image, got a batch of {len(setting.x)}; use --batch 1")
    found = _definitions(Path(folder), setting.x.device)
    try:
        memcnn: Any = importlib.import_module("memcnn")
    except ImportError as error:
        raise ValueError(f"--against: the reference needs memcnn ({error}); install it with pip") from error
    own = setting.denoiser

    def wrapped(layer: Any) -> Any:
        options = {"keep_input": True, "keep_input_inverse": True, "num_bwd_passes": 1}
        return memcnn.InvertibleModuleWrapper(layer, **options)

    def forward(x: Tensor) -> Pair:
        scheduler = copy.deepcopy(setting.scheduler)
        stepping = found["SteppingLayer"](own.unet, own.uncond, own.cond, scheduler, steps, own.guidance_scale)
        step, mix = wrapped(stepping), wrapped(found["MixingLayer"](setting.mix_weight))
        dtype = own.compute_dtype(x.dtype)
        pair = torch.cat([x, x]).to(dtype)
        for i, t in enumerate(scheduler.timesteps):
            numbers = (torch.tensor([float(n)], dtype=dtype, device=x.device) for n in (i, t))
            _, _, pair = step(*numbers, pair)
            pair = mix(pair)
        return pair[:1], pair[1:]

    return forward


def _definitions(folder: Path, device: torch.device) -> dict[str, Any]:
    """What LAYERS names, by name."""
    space: dict[str, Any] = {"torch": torch, "nn": torch.nn, "device": device}
    for file, names in LAYERS.items():
        path = folder / file
        if not path.is_file():
            raise ValueError(f"--against: expected a checkout of DOODL with {file} in it, got {str(folder)!r}")
        nodes = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names]
        missing = set(names) - {node.name for node in nodes}  # type: ignore[attr-defined]
        if missing:
            raise ValueError(f"--against: expected {', '.join(sorted(missing))} in {str(path)!r}, got none")
        exec(compile(ast.Module(nodes, []), str(path), "exec"), space)
    return space
