"""The script that measures regularisers runs, and has a row for each of them."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "regularisers.py"


def test_each_regulariser_has_a_share() -> None:
    spec = spec_from_file_location("bench_regularisers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["bench_regularisers"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    shares = module.main(["--steps", "1", "--rounds", "1", "--latents", "1", "4", "8", "8"])
    assert list(shares) == ["NoiseNorm", "StartDistance", "Whiteness", "NoiseProbability"]
    assert all(share > 0 for share in shares.values())
