"""The script that measures the memory of gradients of weights runs, and its figures are those of the docs."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = spec_from_file_location("bench_weights", ROOT / "bench" / "weights.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["bench_weights"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_peak_does_not_grow_with_the_steps(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """With fewer steps than the docs name. The script itself compares the gradient with plain autograd."""
    peaks = bench.main(["--steps", "1", "5", "--solvers", "EDICT", "--memory", "reversible"])
    assert peaks["EDICT", "reversible", 5] < 1.02 * peaks["EDICT", "reversible", 1]
    (naive,) = re.findall(r"EDICT, naive, 1 steps: ([\d.]+) MiB", capsys.readouterr().out)
    assert peaks["EDICT", "reversible", 5] < float(naive) * 2**20 / 2  # of a fifth of the steps
