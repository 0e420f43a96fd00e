"""The runs of a sweep, and the file in its folder that lists them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PLAN, RUNS = "sweep.json", "runs"
FORMAT = 1
UNNAMED = ("device", "memory", "memory_budget")
"""Options that decide where and how a run is computed, and not what: they are no part of its name."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        prompt: What the picture shows.
        seed: Of the starting noise.
        guide: The name of the guide.
        method: The name of the method.
        setting: The name of the setting; empty where a sweep has none.
        options: Everything else that decides what is computed.
    """

    prompt: str
    seed: int
    guide: str
    method: str
    setting: str
    options: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """The name of the run's folder: words for people, and a hash of all that decides what is computed.

        So a run keeps its folder, and is not done again, when a sweep gets more prompts, seeds or methods.
        """
        decisive = {key: value for key, value in self.options.items() if key not in UNNAMED}
        text = json.dumps([self.prompt, self.seed, decisive], sort_keys=True)
        words = [self.method, self.guide, self.setting, self.prompt, f"s{self.seed}"]
        slugs = [re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.")[:24].rstrip("-.") for word in words]
        return "_".join([*filter(None, slugs), hashlib.sha256(text.encode()).hexdigest()[:12]])


@dataclass(frozen=True)
class Plan:
    """What a sweep consists of.

    Attributes:
        runs: The runs, in the order in which tables list them.
        measures: The names of the measures that judge the pictures.
    """

    runs: tuple[Run, ...]
    measures: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        return {
            "format": FORMAT,
            "measures": list(self.measures),
            "runs": [{"name": run.name, **asdict(run)} for run in self.runs],
        }

    def store(self, folder: Path, replace: bool = False) -> None:
        """Writes the plan into a sweep's folder, unless the same plan is there.

        Args:
            folder: It is made if it does not exist.
            replace: Whether another plan may be replaced. Runs that both have stay as they are.

        Raises:
            ValueError: The folder holds another plan, or something else.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out: expected a folder, got the file {str(folder)!r}")
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        target = folder / PLAN
        has_files = folder.is_dir() and any(folder.glob("[!.]*"))
        if has_files and not target.exists():  # in this order, as the plan is the first file of a sweep
            raise ValueError(
                f"--out: expected a new folder or that of a sweep, got {str(folder)!r}, which holds other files"
            )
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{PLAN}.{secrets.token_hex(8)}.tmp"
        partial.write_text(text, encoding="utf-8")
        try:
            if replace:
                os.replace(partial, target)
            elif not _is_first(partial, target):
                self._compare(Plan.load(folder), folder)
        finally:
            partial.unlink(missing_ok=True)

    def _compare(self, other: Plan, folder: Path) -> None:
        """Raises ValueError if a folder's plan is another one."""
        if other.as_dict() == self.as_dict():
            return
        ours, theirs = {run.name for run in self.runs}, {run.name for run in other.runs}
        more, fewer = len(ours - theirs), len(theirs - ours)
        differs = f"{more} runs are new and {fewer} are gone" if more or fewer else "the names or measures differ"
        raise ValueError(
            f"--out: the sweep in {str(folder)!r} was begun with another configuration ({differs}); pass "
            "--change-plan to go on with this one, which keeps the runs that both have, or another folder"
        )

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Reads the plan of a sweep's folder.

        Raises:
            ValueError: There is none, or it is damaged.
        """
        path = folder / PLAN
        if not path.is_file():
            raise ValueError(f"expected the folder of a sweep, with {PLAN} in it, got {str(folder)!r}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"it has the format {content['format']!r}, and this version reads {FORMAT}")
            runs = tuple(Run(**{k: v for k, v in entry.items() if k != "name"}) for entry in content["runs"])
            names = [entry["name"] for entry in content["runs"]]
            if names != [run.name for run in runs]:
                raise ValueError("the names of its runs do not belong to their options")
            return cls(runs, tuple(content["measures"]))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is damaged or foreign ({error}); start in another folder") from error


def check_distinct(runs: Sequence[Run]) -> None:
    """Raises ValueError if a sweep has a run twice."""
    seen: dict[str, Run] = {}
    for run in runs:
        other = seen.setdefault(run.name, run)
        if other is not run:
            raise ValueError(
                f"sweep: expected different runs, got one twice: method {run.method!r}, guide {run.guide!r}, prompt "
                f"{run.prompt!r}, seed {run.seed}; name each of them once"
            )


def _is_first(partial: Path, target: Path) -> bool:
    """Gives a complete file its name, and says whether it is the first one of that name."""
    try:
        os.link(partial, target)  # in contrast to a rename, this fails where the name is taken
    except FileExistsError:
        return False
    except OSError:  # A file system without hard links; processes that begin at once have the same plan.
        if target.exists():
            return False
        os.replace(partial, target)
    return True
