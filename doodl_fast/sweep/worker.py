"""Does the runs of a sweep, beside any number of other processes that do the same."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..optimization.folder_lock import FolderInUse
from .claims import STALE_AFTER, Claim, ClaimLost, Claims, machine
from .files import remove_partial, write_json
from .plan import RUNS, Run

RESULT, ERROR, TIMING, CLAIMS = "result.json", "error.json", "timing.json", "claims"
SHORTEST_WAIT, LONGEST_WAIT = 0.05, 2.0

Perform = Callable[[Run, Path, Callable[[], None]], dict[str, Any]]
"""Does one run: called with the run, its folder, and a function that raises when the run has been taken over. Returns
what is stored as its result, which must depend on the run alone."""


@dataclass
class Summary:
    """What `work` did.

    Attributes:
        finished: How many runs this process finished.
        failed: The names of all runs of the sweep that failed, in this process or in another one.
        left: How many runs were not done when this process stopped.
    """

    finished: int = 0
    failed: list[str] = field(default_factory=list)
    left: int = 0


def work(
    folder: Path,
    runs: Sequence[Run],
    perform: Perform,
    *,
    progress: Callable[[int], None] | None = None,
    wait: bool = True,
    stale_after: float = STALE_AFTER,
) -> Summary:
    """Does every run that is not done and that no other living process is doing.

    A run that raises an error counts as done, as failed, and the others go on. Interrupting the process (Ctrl-C), or
    killing it, leaves every run as it is after its last stored step.

    Args:
        folder: Of the sweep.
        runs: In the order in which they are done.
        perform: Does one run. What it stores in the run's folder must let it go on after a kill at any time.
        progress: Called with the number of runs that are done, whoever did them, whenever that may have changed.
        wait: Whether to wait for the runs of other processes, and to take them over if those die.
        stale_after: See `Claims`.

    Returns:
        What this process did.
    """
    claims = Claims(folder / CLAIMS, stale_after)
    found, pending, pause = Summary(), list(runs), SHORTEST_WAIT
    while pending:
        busy = []
        for number, run in enumerate(pending):
            if not is_done(folder, run):
                state = _one(folder, run, claims, perform)
                found.finished += state == "finished"
                if state == "busy":
                    busy.append(run)
            if progress is not None:
                progress(len(runs) - len(busy) - (len(pending) - number - 1))
        found.left = len(busy)
        pause = SHORTEST_WAIT if len(busy) < len(pending) else min(1.5 * pause, LONGEST_WAIT)
        pending = busy
        if not wait:
            break
        if pending:
            time.sleep(pause)
    found.failed = [run.name for run in runs if (folder / RUNS / run.name / ERROR).exists()]
    if not found.left:
        claims.clean()
    return found


def is_done(folder: Path, run: Run) -> bool:
    """Whether a run has ended, with a result or with an error."""
    place = folder / RUNS / run.name
    return (place / RESULT).exists() or (place / ERROR).exists()


def forget_errors(folder: Path, runs: Sequence[Run]) -> int:
    """Makes failed runs count as not done, and says how many there were."""
    files = [folder / RUNS / run.name / ERROR for run in runs]
    failed = [file for file in files if file.exists()]
    for file in failed:
        file.unlink(missing_ok=True)
    return len(failed)


def _one(folder: Path, run: Run, claims: Claims, perform: Perform) -> str:
    """Does a run unless another process does it: "finished", "done" by another one, or "busy"."""
    claim = claims.take(run.name)
    if claim is None:
        return "busy"
    done = False
    try:
        if is_done(folder, run):  # by a process that finished between the first look and the claim
            done = True
            return "done"
        _perform(folder, run, claim, perform)
        done = True
        return "finished"
    except (ClaimLost, FolderInUse):  # The other process, which seemed to be dead, or to which we did, goes on.
        return "busy"
    finally:
        claim.release(done)


def _perform(folder: Path, run: Run, claim: Claim, perform: Perform) -> None:
    """Does a run and stores its result, or its error."""
    place = folder / RUNS / run.name
    resumed = place.exists()
    place.mkdir(parents=True, exist_ok=True)
    if resumed:
        remove_partial(place)

    def check() -> None:
        claim.check()
        if is_done(folder, run):
            raise ClaimLost(f"{run.name}: another process has finished this run")

    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result = perform(run, place, check)
    except (ClaimLost, FolderInUse):
        raise
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        write_json(
            place / ERROR,
            {"error": message, "type": type(error).__name__, "traceback": traceback.format_exc()},
        )
        return
    timing = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    write_json(place / TIMING, {**timing, "resumed": resumed, "machine": machine()})
    write_json(place / RESULT, {"run": run.name, **result})


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of a run; None if there is none yet.

    Raises:
        ValueError: It is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); delete it, and the run is done again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is damaged (no object); delete it, and the run is done again")
    return content
