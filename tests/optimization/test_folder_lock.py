"""Two runs never share a folder, and a run that was killed does not block it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from test_optimize import optimize

import doodl_fast
from doodl_fast.optimization.folder_lock import LOCK, FolderLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="locks of Linux and macOS")


def other_process(folder: Path) -> int:
    """The id of a process that holds the lock of a folder until it is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with FolderLock(folder):
            os.write(writing, b"x")
            signal.pause()
        os._exit(0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return child


def test_a_second_process_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    optimize(num_optimization_steps=1, folder=tmp_path)
    holder = other_process(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"folder: .* is in use by another run \(process {holder}\)"):
            optimize(num_optimization_steps=2, resume=tmp_path)
        assert (tmp_path / LOCK).exists()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert (tmp_path / LOCK).exists(), "the killed process left its lock file"
    assert len(optimize(num_optimization_steps=2, resume=tmp_path).losses) == 2
    assert not (tmp_path / LOCK).exists()


def test_a_run_inside_a_run_is_refused(tmp_path: Path) -> None:
    """Two threads, or a callback, of one process."""

    def callback(info: doodl_fast.StepInfo) -> None:
        optimize(num_optimization_steps=1, folder=tmp_path)

    with pytest.raises(ValueError, match=r"is in use by another run \(process \d+\)"):
        optimize(num_optimization_steps=1, folder=tmp_path, callback_on_step_end=callback)


def test_nothing_is_left_where_nothing_was_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss: expected a differentiable scalar"):
        optimize(folder=tmp_path / "a" / "b", loss=lambda images: images)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"folder: expected a folder, got .* which is a file or in one"):
            optimize(folder=path)


def test_a_lock_that_was_removed_by_its_holder_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file may vanish between being opened and being locked; the new one is locked then."""
    real, calls = FolderLock._lock, []

    def lock(self: FolderLock, descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        real(self, descriptor)

    monkeypatch.setattr(FolderLock, "_lock", lock)
    with FolderLock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="is in use"), FolderLock(tmp_path):
            pass


def test_file_systems_without_locks_are_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(RuntimeWarning, match=r"cannot be locked \(.*Operation not supported"), FolderLock(tmp_path):
        assert (tmp_path / LOCK).exists()
