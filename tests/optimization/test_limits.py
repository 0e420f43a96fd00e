"""A process limited to 1.25 times the memory that a plan predicts finishes; naive backpropagation in it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import limited_child
import pytest
from conftest import DEVICE

import doodl_fast
from doodl_fast.solvers.edict import EDICT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").is_file() or DEVICE.type != "cpu", reason="limits the main memory of a Linux process"
)


def limited(memory: str, factor: float) -> dict:
    child = Path(__file__).parents[1] / "limited_child.py"
    here = {**os.environ, "PYTHONPATH": str(Path(doodl_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    here["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # What is freed before the limit is set must not serve below it.
    done = subprocess.run([sys.executable, child, memory, str(factor)], capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_smallest_plan_finishes():
    denoiser, schedule, x = limited_child.parts()
    small = limited("smallest", 1.25)
    assert small["gradient"] == pytest.approx(limited_child.gradient(EDICT(denoiser, schedule), x), rel=1e-6)
    naive = limited("naive", 1.25)
    assert "allocate memory" in naive["error"] and naive["limit"] <= 1.1 * small["limit"]
    assert small["budget"] > 2**24
