"""One gradient under a limit on the process's data, for test_limits.py: prints what happened, as JSON.

    python limited_child.py MEMORY FACTOR

MEMORY: "smallest", the smallest plan of memory="auto", or "naive". The limit is what the process had before plus FACTOR
times the smallest plan's prediction.
"""

from __future__ import annotations

import json
import resource
import sys

import torch
from conftest import golden_denoiser, latents, sd_scheduler

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT


def data_bytes() -> int:
    """Returns the number of bytes that count for RLIMIT_DATA."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))


def gradient(chain: EDICT, x: torch.Tensor) -> float:
    leaf = x.clone().requires_grad_()
    return float(torch.autograd.grad(sum(out.square().sum() for out in chain(leaf)), leaf)[0].norm())


def parts() -> tuple[Denoiser, Schedule, torch.Tensor]:
    schedule = Schedule.from_scheduler(sd_scheduler(), 3)
    return golden_denoiser(torch.float32), schedule, latents(1, 4, 112, 112, dtype=torch.float32)[0]


def main(memory: str, factor: float) -> None:
    denoiser, schedule, x = parts()
    small = latents(1, 4, 8, 8, dtype=torch.float32)[0]
    for mode in ("naive", "checkpoint", "auto"):  # Libraries and threads allocate memory at their first call.
        gradient(EDICT(denoiser, schedule, memory=mode), small)
    auto = EDICT(denoiser, schedule, memory="auto")
    budget = auto.smallest_plan(x).peak
    before = data_bytes()
    chain = EDICT(denoiser, schedule, memory="auto", memory_budget=budget) if memory == "smallest" else None
    chain = chain or EDICT(denoiser, schedule, memory=memory)
    limit = before + int(factor * budget)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    result = {"budget": budget, "limit": limit}
    try:
        result["gradient"] = gradient(chain, x)
    except (RuntimeError, MemoryError) as error:
        result["error"] = str(error)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
