"""Results of tests that are written as they come, in runs that end, that break and that are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds; a run takes one or two where the processor is free
TESTS = """
    import time
    import pytest

    def test_passes(): pass
    def test_fails(): assert "ham" == "eggs"
    def test_is_skipped(): pytest.skip("no reason")

    @pytest.fixture
    def broken(): raise RuntimeError("no fixture")

    def test_has_an_error(broken): pass
    def test_hangs(): time.sleep({seconds})
    def test_comes_last(): pass
"""


def read(path: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("streamed", ROOT / "bench" / "streamed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: dict[str, Any] = module.read(path)
    return result


def start(folder: Path, seconds: int, *more: str) -> subprocess.Popen[bytes]:
    """Starts a run of the tests above in a process group of its own."""
    (folder / "test_some.py").write_text(textwrap.dedent(TESTS.format(seconds=seconds)))
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.streamed",
        "--streamed=out/tests.jsonl",
        *more,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # starts sooner
    return subprocess.Popen(
        [sys.executable, *command, "test_some.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.parametrize("more", [(), ("-p", "xdist", "-n", "1")], ids=["alone", "with a worker"])
def test_a_run_that_ends(tmp_path: Path, more: tuple[str, ...]) -> None:
    assert start(tmp_path, 0, *more).wait(LIMIT) == 1
    found = read(tmp_path / "out" / "tests.jsonl")
    assert found["counts"] == {"passed": 3, "failed": 1, "skipped": 1, "error": 1} and not found["unfinished"]
    assert [row["test"].partition("::")[2] for row in sorted(found["failed"], key=lambda row: row["outcome"])] == [
        "test_has_an_error",
        "test_fails",
    ]
    assert all(word in str(found["failed"]) for word in ("eggs", "no fixture"))


@pytest.mark.parametrize("more", [(), ("-p", "xdist", "-n", "1")], ids=["alone", "with a worker"])
def test_a_run_that_is_killed_has_its_failures(tmp_path: Path, more: tuple[str, ...]) -> None:
    run, path = start(tmp_path, 600, *more), tmp_path / "out" / "tests.jsonl"
    try:
        limit = time.monotonic() + LIMIT
        while "test_hangs" not in str(read(path)["unfinished"]) or "error" not in read(path)["counts"]:
            assert time.monotonic() < limit, read(path)
            time.sleep(0.05)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    found = read(path)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert "test_some.py::test_hangs" in found["unfinished"]


def test_the_summary_names_them(tmp_path: Path) -> None:
    run, out = start(tmp_path, 0), tmp_path / "out"
    (tmp_path / "parts").write_text("tests\t137\t42\t.F\n")
    assert run.wait(LIMIT) == 1
    command = [sys.executable, str(ROOT / "bench" / "gpu_summary.py"), str(out), str(tmp_path)]
    subprocess.run(command, check=True, timeout=LIMIT)
    page = (out / "session.md").read_text()
    assert "| test_some.py::test_fails | failed | AssertionError: assert 'ham' == 'eggs' |" in page
    assert "passed 3, failed 1, skipped 1, error 1" in page and "| tests | 137 | 42 | .F |" in page
    assert json.loads((out / "session.json").read_text())["tests"]["counts"]["passed"] == 3


def test_files_that_cannot_be_collected_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    assert start(tmp_path, 0, "test_broken.py").wait(LIMIT) == 2
    (failed,) = read(tmp_path / "out" / "tests.jsonl")["failed"]
    assert failed["test"] == "test_broken.py" and "nothing_of_this_name" in failed["message"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tests.jsonl").write_text('{"test": "a", "outcome": "begun"}\n{"test": "a", "outc')
    assert read(tmp_path / "tests.jsonl") == {"counts": {}, "failed": [], "unfinished": ["a"]}
    assert read(tmp_path / "nothing.jsonl") == {"counts": {}, "failed": [], "unfinished": []}
