"""Which process does which run, of any number of processes on any number of machines that share a folder.

A claim is a file `RUN.N` in the folder `claims`, with the machine, the process and a random token in it. It is written
under another name and gets its own by a hard link, which fails where the name is taken: so exactly one process makes
`RUN.1`. A process that is killed leaves its claim behind. Whoever finds that out makes `RUN.2`, which again succeeds
for one process alone, and so on; the claim with the highest number counts. Claims of a run that is not done are never
deleted, because a deleted name could be made twice.

A claim's process has died

- on the same machine: when the operating system has given back the lock (flock) that it held on the file. That is known
  at once, also after kill -9.
- on another machine, or where the file system has no locks: when it has not touched the file for `stale_after`
  seconds. A thread touches it six times as often, however long a step takes. Ages are measured by the clock of the file
  system, so the clocks of the machines need not agree.

Locks alone would not do: on some shared file systems they hold within one machine only, and nothing says so. A machine
that sleeps longer than `stale_after` loses its run; it notices before it stores its next step (`Claim.check`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from pathlib import Path

STALE_AFTER = 120.0
BEATS = 6


class ClaimLost(Exception):
    """Another process has taken over a run, as this one seemed to be dead."""


class Claim:
    """A run that belongs to this process until `release`, unless this process seems to have died.

    Args:
        claims: Where it belongs.
        name: The run.
        number: How many claims there have been of this run, this one included.
        descriptor: The open and locked file.
    """

    def __init__(self, claims: Claims, name: str, number: int, descriptor: int) -> None:
        self._claims, self.name, self._number, self._descriptor = claims, name, number, descriptor
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"claim of {name}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        """Touches the file until the claim ends."""
        while not self._ended.wait(self._claims.stale_after / BEATS):
            with contextlib.suppress(OSError):
                os.utime(self._claims.path(self.name, self._number))

    def check(self) -> None:
        """Raises ClaimLost if another process has taken over the run."""
        if self._claims.path(self.name, self._number + 1).exists():
            raise ClaimLost(f"{self.name}: another process has taken over this run")

    def release(self, done: bool) -> None:
        """Ends the claim.

        Args:
            done: Whether the run is done. Then nobody will need a claim of it again, and the files are removed.
                Otherwise the next process may claim the run at once.
        """
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if done:
                for number in range(1, self._number + 1):
                    self._claims.path(self.name, number).unlink(missing_ok=True)
            else:
                os.lseek(self._descriptor, 0, os.SEEK_SET)
                os.write(self._descriptor, b" " * os.fstat(self._descriptor).st_size)
        os.close(self._descriptor)


class Claims:
    """The claims in a sweep's folder.

    Args:
        folder: Of the claims; it is made if it does not exist.
        stale_after: After how many seconds without a sign of life a process of another machine counts as dead.

    Raises:
        ValueError: `stale_after` is not positive.
    """

    def __init__(self, folder: Path, stale_after: float = STALE_AFTER) -> None:
        if not stale_after > 0:
            raise ValueError(f"--stale-after: expected a positive number of seconds, got {stale_after}")
        self.folder, self.stale_after = folder, stale_after
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, number: int) -> Path:
        """The file of a claim."""
        return self.folder / f"{name}.{number}"

    def take(self, name: str) -> Claim | None:
        """Claims a run, or returns None if a living process has it."""
        number = 0
        while self.path(name, number + 1).exists():
            number += 1
        if number and not self._is_dead(self.path(name, number)):
            return None
        return self._make(name, number + 1)

    def clean(self) -> None:
        """Removes what is left in the folder, and the folder. Only for a sweep of which every run is done."""
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _make(self, name: str, number: int) -> Claim | None:
        """Makes a claim unless another process was faster."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(name, number)
        partial = self.folder / f".{secrets.token_hex(8)}.tmp"
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:  # Every run is done, and another process has just removed the folder.
            return None
        try:
            content = {"machine": machine(), "locked": _lock(descriptor), "process": os.getpid()}
            os.write(descriptor, json.dumps(content).encode())
            if _link(partial, path):
                return Claim(self, name, number, descriptor)
            os.close(descriptor)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        return None

    def _is_dead(self, path: Path) -> bool:
        """Whether the process that made a claim has ended, or has given it up."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # The run is done, which the next look at it will show.
            return False
        try:
            text = os.read(descriptor, 10_000)
            if text and not text.strip():
                return True  # It was released before the run was done.
            with contextlib.suppress(ValueError):
                content = json.loads(text)
                if isinstance(content, dict) and content.get("machine") == machine() and content.get("locked") is True:
                    return _is_unlocked(descriptor)
            return self._now() - os.fstat(descriptor).st_mtime > self.stale_after
        finally:
            os.close(descriptor)

    def _now(self) -> float:
        """The time by the clock of the file system."""
        path = self.folder / f".{secrets.token_hex(8)}.tmp"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(descriptor, b"?")
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)


def machine() -> str:
    """Identifies the running kernel, by which locks are seen; on systems that do not tell, the name of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _lock(descriptor: int) -> bool:
    """Locks a file that nobody else knows yet, and says whether the system and the file system can do that."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _is_unlocked(descriptor: int) -> bool:
    """Whether no process holds the lock of an open file."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _link(partial: Path, path: Path) -> bool:
    """Gives a file its name unless the name is taken, and says whether that succeeded."""
    try:
        os.link(partial, path)
    except FileExistsError:
        # Over NFS a link may have been made although its answer was lost.
        return os.stat(partial).st_nlink == 2
    except FileNotFoundError:  # as in `_make`
        return False
    except OSError:
        # A file system without hard links. The claim is empty, so other processes count it by its age alone.
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return False
    return True
