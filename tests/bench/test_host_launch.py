"""The benchmark of launches calls Triton's own launcher on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ops_cases import require

BENCH = Path(__file__).resolve().parents[2] / "bench" / "host_launch.py"


def test_one_round(tmp_path):
    require("native", "cpu")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    # In a process of its own, as Triton is to compile here and not to be interpreted.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    command = [sys.executable, str(BENCH), "--rounds", "1", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"coupling", "coupling_mix_vjp", "rotary_embedding"} <= found.keys()
    assert all(row["native"] > 0 and row["triton"] > 0 for row in found.values())
    assert "| coupling |" in done.stdout
    cubins = {path.stem for path in (tmp_path / "triton").rglob("*.cubin")}
    assert {"coupling_kernel", "rotary_kernel", "gated_kernel"} <= cubins


def test_rounds_are_checked():
    done = subprocess.run([sys.executable, str(BENCH), "--rounds", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "--rounds: expected at least 1, got 0" in done.stderr
