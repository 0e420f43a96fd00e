"""Which process gets which run: exactly one, also of processes that die, sleep, or run on other machines."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from doodl_fast.sweep import claims as claims_module
from doodl_fast.sweep.claims import ClaimLost, Claims

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs processes that are forked")
FORK: Any = None if sys.platform == "win32" else multiprocessing.get_context("fork")


def holding(folder: Path, name: str) -> Any:
    """A process that has claimed a run and waits."""
    ready = FORK.Event()

    def hold() -> None:
        assert Claims(folder).take(name) is not None
        ready.set()
        time.sleep(60)

    process = FORK.Process(target=hold, daemon=True)
    process.start()
    assert ready.wait(30)
    return process


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_run_belongs_to_one_process_and_is_free_after_a_kill(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    for _ in range(3):
        process = holding(tmp_path, "run")
        assert claims.take("run") is None and claims.take("other") is not None
        kill(process)
        claims.folder.joinpath("other.1").unlink()
    claim = claims.take("run")
    assert claim is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"run.{number}" for number in range(1, 5)]
    claim.release(done=True)
    assert not list(tmp_path.iterdir())


def test_of_many_processes_one_takes_over(tmp_path: Path) -> None:
    """Twelve processes find the same dead claim at once, ten times."""
    names = [f"run{number}" for number in range(10)]
    for name in names:
        kill(holding(tmp_path, name))
    start, results = FORK.Barrier(12), FORK.Queue()

    def take() -> None:
        claims = Claims(tmp_path)
        start.wait()
        mine = [name for name in names if claims.take(name) is not None]
        results.put(mine)
        start.wait()  # nobody ends, and so frees what it has, before all have looked

    processes = [FORK.Process(target=take, daemon=True) for _ in range(12)]
    for process in processes:
        process.start()
    taken = [name for _ in processes for name in results.get(timeout=60)]
    assert sorted(taken) == names
    for process in processes:
        process.join(30)


def test_a_released_run_is_free_at_once(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    first = claims.take("run")
    assert first is not None and claims.take("run") is None
    first.release(done=False)
    second = claims.take("run")
    assert second is not None
    second.check()


def foreign(path: Path, age: float, **changes: Any) -> None:
    """A claim as a process of another machine leaves it."""
    path.write_text(json.dumps({"machine": "elsewhere", "locked": True, "process": 1, **changes}))
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.mark.parametrize("content", [{}, {"machine": claims_module.machine(), "locked": False}])
def test_other_machines_and_file_systems_without_locks_count_by_age(tmp_path: Path, content: dict[str, Any]) -> None:
    claims = Claims(tmp_path, stale_after=50)
    foreign(tmp_path / "run.1", 40, **content)
    assert claims.take("run") is None
    foreign(tmp_path / "run.1", 60, **content)
    assert claims.take("run") is not None
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"machine": 3}'])
def test_claims_that_say_nothing_count_by_age(tmp_path: Path, text: str) -> None:
    claims = Claims(tmp_path, stale_after=50)
    (tmp_path / "run.1").write_text(text)
    assert claims.take("run") is None
    os.utime(tmp_path / "run.1", (0, 0))
    assert claims.take("run") is not None


def test_a_living_process_touches_its_claim(tmp_path: Path) -> None:
    claim = Claims(tmp_path, stale_after=0.3).take("run")
    assert claim is not None
    os.utime(tmp_path / "run.1", (0, 0))
    deadline = time.monotonic() + 20
    while (tmp_path / "run.1").stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "run.1").stat().st_mtime > 0
    claim.release(done=True)


def test_a_process_that_slept_too_long_loses_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = Claims(tmp_path, stale_after=1e9).take("run")  # beats that seldom
    assert sleeper is not None
    os.utime(tmp_path / "run.1", (0, 0))
    sleeper.check()
    monkeypatch.setattr(claims_module, "machine", lambda: "elsewhere")
    other = Claims(tmp_path, stale_after=50).take("run")
    assert other is not None
    other.check()
    with pytest.raises(ClaimLost, match="another process has taken over this run"):
        sleeper.check()


def test_without_hard_links_and_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(claims_module.os, "link", refused)
    monkeypatch.setattr(claims_module, "_lock", lambda descriptor: False)
    claims = Claims(tmp_path, stale_after=50)
    claim = claims.take("run")
    assert claim is not None and claims.take("run") is None
    os.utime(tmp_path / "run.1", (0, 0))
    assert claims.take("run") is not None


def test_an_answer_that_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS a link may have been made although the call says that its name was taken."""
    real = os.link

    def repeated(*args: Any) -> None:
        real(*args)
        raise FileExistsError

    monkeypatch.setattr(claims_module.os, "link", repeated)
    claims = Claims(tmp_path)
    assert claims.take("run") is not None
    assert claims.take("run") is None


def test_a_folder_that_is_removed_meanwhile(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims")
    claims.clean()
    claim = claims.take("run")
    assert claim is not None
    claims.clean()
    claim.check()
    claim.release(done=True)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_what_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="--stale-after: expected a positive number of seconds"):
        Claims(tmp_path, seconds)
