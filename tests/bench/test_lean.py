"""The benchmark of lean graphs runs, and what it measures agrees with what it claims."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "lean.py"


@pytest.fixture(scope="module")
def bench():
    spec = spec_from_file_location("bench_lean", SCRIPT)
    module = sys.modules["bench_lean"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_goals_at_real_size(bench, tmp_path, capsys):
    bench.main(["--networks", "sd15", "vae", "--out", str(tmp_path / "lean.json")])
    unet, vae = (entry["ways"] for entry in json.loads((tmp_path / "lean.json").read_text()))
    assert unet["plain"]["kept"] == pytest.approx(1478 * 2**20, rel=1e-3)  # What autograd keeps was measured before.
    assert unet["lean"]["kept"] <= 0.62 * unet["plain"]["kept"]
    assert unet["recompute"]["kept"] <= 0.38 * unet["plain"]["kept"]
    assert unet["blocks"]["kept"] < unet["recompute"]["kept"]
    assert vae["lean"]["peak"] <= 0.40 * vae["plain"]["peak"]
    # Cross-attention is computed again where that keeps less: 0.4% of a forward pass, in five layers of two widths.
    queries = 5 * (320 * 64**2 + 640 * 32**2)
    assert unet["lean"]["flops"] - unet["plain"]["flops"] == 2 * 77 * 4 * queries  # a batch of 2, 77 keys, two products
    assert unet["recompute"]["flops"] < unet["blocks"]["flops"]
    assert sum(unet["lean"]["operators"].values()) == pytest.approx(unet["lean"]["kept"], rel=0.01)
    assert "SD 1.5 UNet, 512 x 512" in capsys.readouterr().out


@pytest.mark.usefixtures("lean_small_tensors")
def test_what_is_measured_is_the_same_function(bench):
    network = bench.vae(
        4,
        torch.float32,
        block_out_channels=(32, 32),
        **{
            name: (kind,) * 2
            for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D"))
        },
    )
    network[0].requires_grad_(False)
    outputs = []
    for way in bench.WAYS:
        with bench.one_way(network[0], way) as run:
            outputs.append(network[2](run, network[1]))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    seconds = bench.times(network, ["plain", "lean"], 1)
    assert seconds.keys() == {"plain", "lean"}
    assert bench.sizes(network, "lean")["kept"] < bench.sizes(network, "plain")["kept"]
