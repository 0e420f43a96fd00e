"""The benchmark of ops in whole networks leaves out what it says, and computes the same function."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import require

import doodl_fast
from doodl_fast import ops

pytestmark = pytest.mark.usefixtures("lean_small_tensors")
BLOCKS, SINGLE_BLOCKS = 1, 2


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    yield importlib.import_module("lean_ops")
    sys.modules.pop("lean_ops")


@pytest.fixture
def flux(bench):
    changes = {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    changes |= {"joint_attention_dim": 64, "pooled_projection_dim": 64}
    network = importlib.import_module("lean").flux(BLOCKS, SINGLE_BLOCKS, 12, torch.float32, 16, **changes)
    network[0].requires_grad_(False)
    return network


def test_every_op_is_counted_and_left_out(bench, flux):
    require("native", "cpu")
    if not ops.matches_torch("modulated_norm"):
        pytest.skip("this CPU's kernels round in another way, so lean layers leave adaptive norms to PyTorch")
    # A block norms the image and the prompt once, a single block both together, and the last norm is one more.
    norms = 2 * BLOCKS + SINGLE_BLOCKS + 1
    # Queries and keys are rotated in each block, and again for the gradient.
    rotations = 2 * (BLOCKS + SINGLE_BLOCKS)
    of_rotations = {"rotary_embedding": 2 * rotations, "rotary_embedding_backward": rotations}
    of_norms = {"modulated_norm": norms, "modulated_norm_backward": norms - 1}
    with bench.one_way(flux[0], "lean") as run:
        found = bench.calls(flux, run)
        # The first norm of the prompt has an input that does not depend on the network's, and needs no gradient.
        assert found == of_norms | of_rotations
        with bench.left_out(("gated_activation",)):
            assert bench.calls(flux, run) == found
        with bench.left_out(("modulated_norm",)):
            assert bench.calls(flux, run) == of_rotations
        with bench.left_out(("modulated_norm", "rotary_embedding")):
            assert not bench.calls(flux, run)
        assert bench.calls(flux, run) == found
    rows = bench.compared(flux, 1)
    assert [(row["op"], row["calls"], row["backward calls"]) for row in rows] == [
        ("modulated_norm", norms, norms - 1),
        ("rotary_embedding", 2 * rotations, rotations),
        ("all", norms + 2 * rotations, norms - 1 + rotations),
    ]
    for row in rows:
        assert row["same bits"] and all(row[part] > 0 for part in ("forward", "VJP", "both"))


def test_a_difference_of_one_bit_is_reported(bench, flux, monkeypatch):
    require("native", "cpu")
    if not ops.matches_torch("modulated_norm"):
        pytest.skip("this CPU's kernels round in another way, so lean layers leave adaptive norms to PyTorch")
    op = ops.modulated_norm

    def other(*args):
        y, *rest = op(*args)
        return torch.nextafter(y, y + 1), *rest

    monkeypatch.setattr(ops, "modulated_norm", other)
    rows = {row["op"]: row["same bits"] for row in bench.compared(flux, 1)}
    assert rows == {"modulated_norm": False, "rotary_embedding": True, "all": False}


def test_shares_are_medians_of_the_rounds(bench):
    found = bench.shares([(1.0, 1.0), (2.0, 4.0), (3.0, 2.0)], [(2.0, 4.0), (2.0, 4.0), (2.0, 4.0)])
    assert found == {"forward": 1.0, "VJP": 0.5, "both": pytest.approx(5 / 6)}


def test_the_command(bench, flux, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SMALL, "flux", ("a tiny transformer", lambda: flux))
    threads = torch.get_num_threads()
    try:
        with doodl_fast.backend("eager"):  # Lean layers then call no op.
            bench.main(["--networks", "flux", "--rounds", "1", "--out", str(tmp_path / "found.json")])
    finally:
        torch.set_num_threads(threads)
    assert "| a tiny transformer | none |" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text()) == [
        {"network": "flux", "title": "a tiny transformer", "ops": []}
    ]
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "0"])
    assert "--rounds: expected at least 1, got 0" in capsys.readouterr().err
