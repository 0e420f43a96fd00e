"""The script that compares the solvers runs from end to end, and goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "solvers.py"


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_script(tmp_path: Path) -> None:
    out = tmp_path / "solvers.json"
    pictures = run(out, "--solvers", "DDIM", "--pictures")
    assert pictures.returncode == 0 and "CPU seconds" not in pictures.stdout, pictures.stderr
    (counted,) = json.loads(out.read_text())["rows"]
    assert set(counted) == {"solver", "steps", "right"}
    second = run(out, "--solvers", "DDIM", "Rex SDE, Euler")
    assert second.returncode == 0, second.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["solver"] for row in rows] == ["DDIM", "Rex SDE, Euler"] and rows[1]["apart"] > 0
    row = rows[0]
    assert (row["steps"], row["calls"], row["right"]) == (4, 4, counted["right"]) and 0 <= row["right"][0] <= 2
    assert row["peak"] > 0 and row["seconds"] > 0 and row["first"] > 0
    assert "Right pictures, of 2 (2 prompts x 1 seeds):" in second.stdout
    results = json.loads(out.read_text())
    out.write_text(json.dumps({**results, "setting": {"prompts": 7}}))
    assert "has rows of another setting" in run(out).stderr
