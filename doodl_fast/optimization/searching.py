"""Best of N starts: the baseline that optimisation has to beat, and a better place for it to begin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .arguments import as_pair, check_functions, check_randomness, check_stopping
from .assembly import new_objective, new_update
from .binding import BoundChain
from .fingerprint import Fingerprint, check_same, fingerprint
from .folder_lock import FolderLock
from .losses import Losses
from .objective import Decode, Objective, undecoded
from .progress import Progress
from .result import Pair
from .run_folder import check_home, hash_of, home_of
from .update import UpdateSettings, norms
from .variables import START, VariableOptions


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        latents: The best starting latents (x, y), each (B, C, ...).
        images: Their images.
        loss: Their loss; with ``per_sample=True`` the mean of the samples' losses.
        losses: For every start its loss, or with ``per_sample=True`` the losses of all samples.
        best: The number of the best start, counted from 0; with ``per_sample=True`` that of each sample.
    """

    latents: Pair
    images: tuple[Tensor, ...]
    loss: float
    losses: list[Any]
    best: Any


@dataclass
class Scored:
    """The starts that a search has scored, which it need not score again after an interruption.

    Attributes:
        home: Where they are stored after each start; None for nowhere.
        settings: What a stored search must have in common with the one that continues it.
        functions: Identifies the chain, the decoder and the loss, which must be the same too.
        losses: What each start was scored, in order.
        callback: See `search`. It is called before a start is stored.
    """

    home: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    functions: Fingerprint = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)
    callback: Callable[[int, Any], Any] | None = None

    def add(self, losses: list[float], per_sample: bool) -> None:
        """Notes the losses of the next start, and stores them with PyTorch's global random state."""
        if self.callback is not None:
            self.callback(len(self.losses), losses if per_sample else losses[0])
        self.losses.append(losses)
        if self.home is not None:
            tree = {"search": self.settings, "functions": self.functions, "losses": self.losses}
            checkpoint.save(self.home, {**tree, "random": checkpoint.random_state()}, len(self.losses))

    def load(self, home: Path) -> None:
        """Continues from what a folder holds. Raises ValueError if that is something else than this search."""
        tree = checkpoint.load(home)
        stored = tree.get("search")
        if stored is None:
            raise ValueError(f"resume: {str(home)!r} holds an optimisation, expected a search; pass another folder")
        check_same("search", home, self.settings, stored, self.functions, tree["functions"])
        self.losses = list(tree["losses"])
        checkpoint.restore_random_state(tree["random"])


def search(
    chain: Any,
    latents: Tensor | Pair,
    decode: Decode | None,
    loss: Any,
    best_of: int = 16,
    *,
    first_image_only: bool = False,
    per_sample: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool | str | Path = False,
    callback_on_start_end: Callable[[int, Any], Any] | None = None,
) -> SearchResult:
    """Scores N starts and returns the best one, without a gradient.

    This is the baseline that ReNO (Eyring et al., NeurIPS 2024, arXiv 2406.04312) compares with. A start costs one run
    of the chain; a step of `optimize` costs one as well, and its gradient every evaluation again with a VJP.

    Args:
        chain: As in `optimize`.
        latents: The first start. The others are drawn from the seed and scaled to its norms.
        decode: As in `optimize`.
        loss: As in `optimize`.
        best_of: The number of starts N.
        first_image_only: As in `optimize`.
        per_sample: Whether each sample of the batch keeps its own best start.
        seed: Of the other starts.
        folder: Where the losses are stored after every start, as in `optimize`.
        resume: Whether to continue the search in `folder`; or the folder itself. The result is bit-identical to that of
            a search that was never interrupted. `best_of` may be larger than it was.
        callback_on_start_end: Called after every start with its number and its loss, or with the losses of all samples.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument cannot work, or the folder holds something else than this search.

    Example:
        >>> found = search(chain, chain.noise(seed=0), chain.decode, loss, best_of=64)
    """
    check_functions(chain, decode, loss, None)
    check_randomness(seed, None)
    check_stopping(None, 0.0, best_of)
    x, y = as_pair(latents)
    variables = {START: VariableOptions()}
    settings = UpdateSettings(renormalize_latents=False, tied_latents=False)
    bound = BoundChain(chain, variables, x, per_sample, seed)
    update = new_update((x, y), settings, torch.Generator(), variables, {}, None, None, per_sample)
    objective = new_objective(
        bound, decode or undecoded, Losses.of(loss), x.dtype, update, first_image_only, per_sample
    )
    home = home_of(folder, resume)
    check_home(home, resume)
    with contextlib.nullcontext() if home is None else FolderLock(home):
        check_home(home, resume)  # again, as another process may have used the folder in between
        scored = Scored(home, callback=callback_on_start_end)
        if home is not None:
            scored.functions = fingerprint(chain, decode or undecoded, Losses.of(loss))
            plain = {"seed": seed, "first_image_only": first_image_only, "per_sample": per_sample}
            scored.settings = {**plain, "start": hash_of(x, y)}
            if resume:
                scored.load(home)
        start, losses, best = best_start(update.latents, objective, best_of, seed, per_sample, {}, scored)
        found = objective.score(start)
    return SearchResult((start[0], start[1]), found.images, found.mean, losses, best)


def start_from_best(run: Progress, objective: Objective, count: int, seed: int) -> None:
    """Lets a run that has not begun start from the best of `count` starts."""
    update = run.update
    start, _, _ = best_start(update.latents, objective, count, seed, run.samples is not None, update.values())
    update.latent.latents = start
    run.best_latents = list(start)
    if run.samples is not None:
        run.samples.best_latents = list(start)


def best_start(
    first: list[Tensor],
    objective: Objective,
    count: int,
    seed: int,
    per_sample: bool,
    values: dict[str, list[Tensor]],
    scored: Scored | None = None,
) -> tuple[list[Tensor], list[Any], Any]:
    """The best of several starts, the losses of all, and its number.

    Every start besides the first is drawn in float32 on the CPU, and x and y are equal in it. Those that `scored` has
    are drawn again and not scored again; the others are added to it.
    """
    scored = scored or Scored()
    # Another seed than that of the perturbation, which would draw the same numbers.
    generator = torch.Generator().manual_seed((seed + 2**40) % 2**63)
    rows = 1 if per_sample else first[0].shape[0]
    best, losses = list(first), []
    lowest, numbers = torch.empty(0), torch.empty(0)
    for number in range(count):
        start = list(first)
        if number:
            noise = torch.randn(rows, *first[0].shape[1:], generator=generator).to(first[0]).expand_as(first[0])
            start = [noise * (norms(z) / norms(noise)).to(z.dtype) for z in first]
        if number == len(scored.losses):
            found = objective.score(start, values)
            scored.add(list(found.sample_means()) if per_sample else [found.mean], per_sample)
        value = torch.tensor(scored.losses[number], dtype=torch.float64)
        losses.append(value.tolist() if per_sample else scored.losses[number][0])
        if not number:
            lowest, numbers = value, torch.zeros_like(value, dtype=torch.long)
            continue
        better = value < lowest
        lowest, numbers = torch.where(better, value, lowest), torch.where(better, number, numbers)
        mask = better.to(first[0].device).view(-1, *[1] * (first[0].ndim - 1))
        best = [torch.where(mask, new, old) for new, old in zip(start, best, strict=True)]
    return best, losses, numbers.tolist() if per_sample else int(numbers)
