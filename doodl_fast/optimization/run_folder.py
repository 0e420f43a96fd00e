"""The folder in which an optimisation or a search is stored: whether it can be begun or continued there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from . import checkpoint
from .arguments import check_path


def home_of(folder: str | Path | None, resume: bool | str | Path) -> Path | None:
    """The folder of the run, or None. Raises ValueError for arguments that contradict each other."""
    check_path("folder", folder)
    check_path("resume", resume)
    if resume is True and folder is None:
        raise ValueError("resume: expected folder= beside resume=True, got none; name the folder that holds the run")
    if isinstance(resume, bool):
        return None if folder is None else Path(folder)
    if folder is not None and Path(folder) != Path(resume):
        raise ValueError(f"resume: expected the same folder as folder={str(folder)!r}, got {str(resume)!r}")
    return Path(resume)


def check_home(home: Path | None, resume: bool | str | Path) -> None:
    """Raises ValueError if a new run is to be stored over another, or if there is no run to be resumed."""
    if home is None:
        return
    stored = (home / checkpoint.INDEX).exists()
    lost = checkpoint.without_index(home)
    if lost is not None:
        name = "resume" if resume else "folder"
        raise ValueError(
            f"{name}: {str(home)!r} holds {lost} without the {checkpoint.INDEX} that belongs to it, so its run cannot "
            "be resumed; pass another folder, or delete that file to begin anew"
        )
    if stored and not resume:
        raise ValueError(
            f"folder: {str(home)!r} already holds a run; pass resume=True to continue it, or another folder"
        )
    if resume and not stored:
        raise ValueError(
            f"resume: expected a folder with {checkpoint.INDEX} in it, got {str(home)!r}; start without resume="
        )


def hash_of(x: Tensor, y: Tensor) -> str:
    """A hash of the values of the starting latents."""
    data = b"".join(z.detach().double().cpu().contiguous().numpy().tobytes() for z in (x, y))
    return hashlib.sha256(data).hexdigest()
