"""The benchmark compares like with like, and its script runs from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from ops_cases import require
from torch.utils._pytree import tree_leaves

from doodl_fast import ops

pytest.importorskip("pytest_benchmark")
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "ops.py"


@pytest.fixture(scope="module")
def bench():
    spec = spec_from_file_location("bench_ops", SCRIPT)
    module = sys.modules["bench_ops"] = module_from_spec(spec)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_every_implementation_computes_the_same(bench):
    for dtype, (state, network) in bench.DTYPES.items():
        for op in bench.OPS:
            if op == "latent_update" and dtype != "fp32":
                continue
            case = bench.make_case(op, (1, 4, 8, 8), state, network, "cpu")
            plain, fused = tree_leaves(case.plain(*case.operands)), tree_leaves(case.fused())
            assert [z.dtype for z in plain] == [z.dtype for z in fused]
            tolerance = 2e-2 if torch.float16 in (state, network) else 1e-5
            for got, want in zip(fused, plain, strict=True):
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_the_native_ops_allocate_their_outputs_alone(bench):
    require("native")
    for op in bench.OPS[:-1]:
        case = bench.make_case(op, (1, 4, 8, 8), torch.float32, torch.float16, "cpu")
        with ops.backend("native"), bench.Allocations() as seen:
            outputs = tree_leaves(case.fused())
        assert seen.total == sum(z.numel() * z.element_size() for z in outputs)
        with bench.Allocations() as seen:
            case.plain(*case.operands)
        assert seen.total > sum(z.numel() * z.element_size() for z in outputs)


def test_script(tmp_path, bench):
    results, page = tmp_path / "ops.json", tmp_path / "ops.md"
    page.write_text("# Old\n\n| old |\n\n## Another section\n\nkept\n")
    # a worker of pytest-xdist would hand down the variable by which pytest-benchmark knows it, and times nothing there
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    command = [sys.executable, SCRIPT, "--quick", "--no-compile", "--sizes=SD", "--busy", "--device=cpu"]
    done = subprocess.run(
        [*command, f"--json={results}", f"--table={page}"],
        capture_output=True,
        text=True,
        env={**clean, "DOODL_FAST_BACKEND": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(results.read_text())["benchmarks"]
    found = {(entry["extra_info"]["op"], entry["extra_info"]["implementation"]) for entry in entries}
    assert found >= {(op, implementation) for op in bench.OPS for implementation in ("eager", "copy", "clone")}
    assert len(found) == len(entries) and all(len(entry["stats"]["data"]) == 5 for entry in entries)
    said = page.read_text()
    assert "| coupling_mix | SD | fp32 |" in said and torch.__version__ in said and "was busy" in said
    assert "old |" not in said and said.endswith("|\n\n## Another section\n\nkept\n")


def test_unknown_sizes_are_refused(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--sizes=SD,huge", f"--json={tmp_path / 'r'}"], capture_output=True)
    assert done.returncode != 0 and b"--sizes: expected some of SD, SDXL, video, 2^24, got huge" in done.stderr
