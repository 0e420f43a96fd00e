"""The bounds of `bench/block_mixes.py`: closed forms, and blocks that add up to what a whole network keeps."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def mixes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    return importlib.import_module("block_mixes")


def test_what_is_computed_again_within_a_budget(mixes):
    """Between two ways lies what evaluations of both kinds take; a way above that line is of no use."""
    points = [(0, 10), (2, 6), (3, 5.9), (10, 0)]
    assert mixes.hull(points) == [(0, 10), (2, 6), (10, 0)]
    assert [mixes.again(points, budget) for budget in (0, 1, 2, 6, 10, 20)] == [10, 8, 6, 3, 0, 0]


def test_blocks_with_the_most_operations_for_a_byte_come_first(mixes):
    block = mixes.Block
    whole = [block(True, 10, 5, 5), block(False, 10, 5, 20)]
    recompute = [block(True, 10, 5, 5), block(False, 4, 9, 20)]
    # From inputs alone: the second block without products, then whole products there and the first block whole.
    points = mixes.mixtures((100, 25), whole, recompute)
    assert points[0] == (100, 25) and points[1] == pytest.approx((104, 9)) and points[-1] == pytest.approx((120, 0))


def test_the_blocks_of_a_network(mixes):
    """What all blocks keep beyond their inputs is what the network keeps less without checkpoints."""
    lean_bench = importlib.import_module("lean")
    network = lean_bench.unet({**lean_bench.SMALL_UNET, "layers_per_block": 1}, 16, torch.float32)
    network[0].requires_grad_(False)
    lean, checkpointed = (mixes.sizes(network, way, operators=False) for way in ("lean", "blocks"))
    blocks = mixes.measure_blocks(network, "lean")
    others = [block for block in blocks if not block.residual]
    assert 0 < len(others) < len(blocks)
    kept = sum(block.kept for block in others)
    assert lean["kept"] - checkpointed["kept"] == pytest.approx(kept, rel=0.02)
    assert checkpointed["flops"] - lean["flops"] == pytest.approx(sum(b.again for b in others), rel=0.02)
