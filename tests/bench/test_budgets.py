"""The comparison of budgets runs, and the plan of whole graphs that it compares with is the largest that fits."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "budgets.py"


def test_half_of_every_graph(monkeypatch, capsys):
    spec = spec_from_file_location("bench_budgets", SCRIPT)
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(sys, "argv", ["budgets.py", "--steps", "2", "--rounds", "1"])
    bench.main()
    said = capsys.readouterr().out
    assert "plain is " in said and "lean is " in said and "budget 0.5 of that" in said
    assert said.count("predicted peak") == 3 and "whole:\n  kept                     graphs of the last " in said
