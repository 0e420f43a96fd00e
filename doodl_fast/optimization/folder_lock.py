"""A lock on a run's folder, so that one process at a time stores its state there."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from types import TracebackType

LOCK = ".lock"


class FolderInUse(ValueError):
    """Another process holds a folder."""


class FolderLock:
    """``with FolderLock(folder):`` holds the folder for its duration.

    The operating system gives the lock back when the process ends, however it ends, so the lock file of a process that
    was killed is not in the way. The lock file is removed at the end, and so are the folders that were made for it if
    they are empty. On a system or a file system without such locks a warning is given instead.

    Args:
        folder: It is made if it does not exist.

    Raises:
        FolderInUse: Another process holds the folder. It is a ValueError.
        ValueError: The folder's path is that of a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> FolderLock:
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"folder: expected a folder, got {str(self.folder)!r}, which is a file or in one"
            ) from error
        while self._descriptor is None:
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                self._lock(descriptor)
                if self._is_current(descriptor):
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, str(os.getpid()).encode())
        return self

    def _lock(self, descriptor: int) -> None:
        """Takes the lock of an open file. Raises FolderInUse if another process has it."""
        try:
            import fcntl
        except ImportError:  # Windows
            self._warn("this system has no file locks")
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            raise FolderInUse(
                f"folder: {str(self.folder)!r} is in use by another run (process {holder}); wait for it to end, or "
                "pass another folder"
            ) from error
        except OSError as error:  # some network file systems have no locks
            self._warn(str(error))

    def _warn(self, reason: str) -> None:
        """Warns that the folder is not protected."""
        warnings.warn(
            f"folder: {str(self.folder)!r} cannot be locked ({reason}); see to it that no other run uses it",
            RuntimeWarning,
            stacklevel=4,
        )

    def _is_current(self, descriptor: int) -> bool:
        """Whether the lock file is still the one that was opened, and not one that its holder has removed since."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.folder / LOCK, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        with contextlib.suppress(OSError):
            (self.folder / LOCK).unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        with contextlib.suppress(OSError):  # the first folder that holds something stays, and those above it
            for path in self._made:
                path.rmdir()
