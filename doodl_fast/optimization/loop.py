"""The optimisation loop of DOODL (Wallace et al., ICCV 2023, arXiv 2303.13703) and its result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..chain.memory.planner import release
from . import checkpoint as runstate
from . import low_memory as lean
from .update import LatentUpdate, OptimizerFactory, UpdateSettings

Pair = tuple[Tensor, Tensor]
Gradient = tuple[tuple[float, ...], tuple[Tensor, ...], list[Tensor]]
Decode = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees of one optimisation step, all of it from *before* the step's update.

    step counts from 0; loss is the mean of the decoded images' losses; latents the noise latents (x, y); images the
    decoded images, one or two (``first_image_only``), detached.
    """

    step: int
    loss: float
    latents: Pair
    images: tuple[Tensor, ...]


@dataclass(frozen=True)
class Result:
    """What an optimisation found.

    latents: final noise latents (x, y), float32 or better; images: what they decode to, one image for each decoded
    member. losses: mean loss at the start of each step; pair_losses: each member's; final_loss: after the last update.
    best_step: the step whose starting latents had the lowest loss (``len(losses)`` for the final ones); best_latents,
    best_images and best_loss belong to it.
    """

    latents: Pair
    images: tuple[Tensor, ...]
    losses: list[float]
    pair_losses: list[tuple[float, ...]]
    final_loss: float
    best_step: int
    best_loss: float
    best_latents: Pair
    best_images: tuple[Tensor, ...]


def optimize(
    chain: Callable[..., Pair],
    latents: Tensor | Pair,
    decode: Decode,
    loss: Loss,
    num_optimization_steps: int = 50,
    *,
    learning_rate: float = 1.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    clip_grad_value: float | None = 1e-3,
    tied_latents: bool = True,
    renormalize_latents: bool = True,
    perturbation_scale: float = 1e-4,
    first_image_only: bool = False,
    optimizer: OptimizerFactory | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    callback: Callable[[StepInfo], bool | None] | None = None,
    progress: bool = True,
    folder: str | Path | None = None,
    resume: bool | str | Path = False,
) -> Result:
    """Optimises noise latents so that the images they turn into have a low loss.

    chain: ``x0, y0 = chain(xT, yT)``, differentiable, e.g. `doodl_fast.EDICT`. If it has memory="auto", its budget is
    for the whole gradient: decode and loss are measured once beforehand. Where that spares the chain more, or when
    memory runs out in them (torch.OutOfMemoryError), they are replaced by leaner versions of themselves: their
    ``leaner()``, which `doodl_fast.Decoder` and the CLIP guides have.
    latents: (B, C, ...) floating; one tensor starts both members equal, a pair gives (x, y).
    decode: final latents of the given dtype (B, C, ...) -> images, differentiable, e.g. `doodl_fast.Decoder`.
    loss: images -> differentiable scalar. Each member's images are decoded, scored and back-propagated before the
        other's, so that one decoder graph is alive at a time.
    learning_rate ... perturbation_scale: see `doodl_fast.UpdateSettings`; the update runs in float32.
    first_image_only: only the first member is decoded and scored.
    optimizer: factory of any ``torch.optim.Optimizer``, replacing momentum SGD, e.g. ``lambda p: torch.optim.Adam(p,
    lr=1e-2)``. seed, generator: of the perturbation (a CPU generator, which replaces the seed).
    callback: called with a `StepInfo` before each update; returning True ends the optimisation there.
    folder: where the state is stored after every step, atomically; resume: continue from there (True: from
        ``folder``), with bit-identical results also after a kill, provided that chain, decode and loss are the same.
        PyTorch's global random state is stored and restored with it, for losses that draw cutouts.

    Returns a `Result`. Raises ValueError or TypeError for arguments that cannot work, naming them, and
    FloatingPointError when a loss or gradient is not finite (the state of the step before stays stored).
    """
    settings = UpdateSettings(
        learning_rate, momentum, nesterov, clip_grad_value, tied_latents, renormalize_latents, perturbation_scale
    )
    if (
        isinstance(num_optimization_steps, bool)
        or not isinstance(num_optimization_steps, int)
        or num_optimization_steps < 1
    ):
        raise ValueError(f"num_optimization_steps: expected an int of at least 1, got {num_optimization_steps!r}")
    x, y = _as_pair(latents)
    generator = generator or torch.Generator().manual_seed(seed)
    update = LatentUpdate(x, y, settings, generator, optimizer)
    decode, loss = lean.fitted(chain, decode, loss, update.latents[0], x.dtype)
    objective = Objective(chain, decode, loss, x.dtype, 1 if first_image_only else 2)
    run = Run(update, {**settings.as_dict(), "first_image_only": first_image_only, "start": _fingerprint(x, y)})
    home = _home(folder, resume)
    if resume and home is not None:
        run.load(home)
    return descend(run, objective, num_optimization_steps, callback, progress, home)


def descend(
    run: Run,
    objective: Objective,
    num_optimization_steps: int,
    callback: Callable[[StepInfo], bool | None] | None = None,
    progress: bool = True,
    home: Path | None = None,
) -> Result:
    """The loop of `optimize`, from wherever the run stands; it is stored in `home`, if there is one."""
    with tqdm(total=num_optimization_steps, initial=min(run.step, num_optimization_steps), disable=not progress) as bar:
        while run.step < num_optimization_steps:
            losses, images, gradients = objective.gradient(run.update.latents, run.step)
            run.record(losses)
            bar.set_postfix(loss=f"{run.losses[-1]:.4g}")
            info = StepInfo(run.step, run.losses[-1], (run.update.latents[0], run.update.latents[1]), images)
            stop = callback(info) if callback else False
            run.update.step(*gradients)
            run.step += 1
            bar.update()
            if home is not None:
                run.save(home)
            if stop:
                break
    return run.finish(objective)


def _as_pair(latents: Tensor | Pair) -> Pair:
    pair = (latents, latents) if isinstance(latents, Tensor) else tuple(latents)
    if len(pair) != 2 or not all(isinstance(z, Tensor) and z.is_floating_point() for z in pair):
        raise TypeError(f"latents: expected a floating tensor or a pair of them, got {type(latents).__name__}")
    x, y = pair
    if x.ndim < 2 or x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            "latents: expected (B, C, ...) tensors, alike in shape, dtype and device, got "
            f"{tuple(x.shape)} {x.dtype} {x.device} and {tuple(y.shape)} {y.dtype} {y.device}"
        )
    if not all(bool(torch.isfinite(z).all()) for z in pair):
        raise ValueError("latents: expected finite values, got NaN or Inf")
    return x, y


def _fingerprint(x: Tensor, y: Tensor) -> str:
    data = b"".join(z.detach().double().cpu().contiguous().numpy().tobytes() for z in (x, y))
    return hashlib.sha256(data).hexdigest()


def _home(folder: str | Path | None, resume: bool | str | Path) -> Path | None:
    if resume is True and folder is None:
        raise ValueError("resume: expected folder= beside resume=True, got none; name the folder that holds the run")
    if not isinstance(resume, bool):
        if folder is not None and Path(folder) != Path(resume):
            raise ValueError(f"resume: expected the same folder as folder={str(folder)!r}, got {str(resume)!r}")
        return Path(resume)
    home = None if folder is None else Path(folder)
    if home is not None and not resume and (home / runstate.INDEX).exists():
        raise ValueError(
            f"folder: {str(home)!r} already holds a run; pass resume=True to continue it, or another folder"
        )
    return home


@dataclass
class Objective:
    """From noise latents to losses, and back to the gradients with respect to the latents."""

    chain: Callable[..., Pair]
    decode: Decode
    loss: Loss
    dtype: torch.dtype
    members: int

    def gradient(self, latents: list[Tensor], step: int) -> Gradient:
        """Losses, images and the latents' gradients; with a chain that plans its memory tried again, leaner, when that
        runs out, while it can be."""
        if getattr(self.chain, "planner", None) is None:
            return self._gradient(latents, step)
        random = runstate.random_state()
        while True:
            try:
                return self._gradient(latents, step)
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # which holds what the pass had made
            release(latents[0].device)
            if not self._shrink(latents[0]):
                raise failure
            runstate.restore_random_state(random)

    def _shrink(self, latents: Tensor) -> bool:
        """Whether there was something to make smaller."""
        pair = lean.leaner(self.decode, self.loss)
        if pair is None:
            return self.chain.planner.make_smaller_plan(latents) is not None  # type: ignore[attr-defined]
        self.decode, self.loss = pair
        return True

    @torch.enable_grad()
    def _gradient(self, latents: list[Tensor], step: int) -> Gradient:
        start = [z.detach().requires_grad_() for z in latents]
        ends = self.chain(*start)
        losses, images, cotangents = [], [], []
        for end in ends[: self.members]:
            leaf = end.detach().to(self.dtype).requires_grad_()
            image, value = self._score(leaf)
            (cotangent,) = torch.autograd.grad(value, leaf)
            losses.append(float(value.detach()))
            images.append(image.detach())
            cotangents.append(cotangent.to(end.dtype))
            del image, value
        cotangents += [torch.zeros_like(end) for end in ends[self.members :]]
        gradients = list(torch.autograd.grad(ends, start, cotangents))
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            raise FloatingPointError(
                f"gradient: NaN or Inf at optimisation step {step}; a `Chain` names its own, so look at the loss and "
                "the decoder: try float32 for them, or a lower learning_rate"
            )
        return tuple(losses), tuple(images), gradients

    @torch.no_grad()
    def value(self, latents: Pair) -> tuple[tuple[float, ...], tuple[Tensor, ...]]:
        ends = self.chain(*latents)
        scored = [self._score(end.to(self.dtype)) for end in ends[: self.members]]
        return tuple(float(value) for _, value in scored), tuple(image for image, _ in scored)

    def _score(self, end: Tensor) -> tuple[Tensor, Tensor]:
        image = self.decode(end)
        if not isinstance(image, Tensor):
            hint = "return its .sample" if hasattr(image, "sample") else "return the images as one tensor"
            raise TypeError(f"decode: expected a function that returns a tensor, got {type(image).__name__}; {hint}")
        value = self.loss(image)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            got = f"shape {tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected a differentiable scalar tensor, got {got}; reduce it with .mean()")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError(
                "loss: expected a differentiable scalar, got one without a graph; do not detach, and do not decode or "
                "score under torch.no_grad()"
            )
        if not bool(torch.isfinite(value)):
            raise FloatingPointError(f"loss: expected a finite value, got {float(value.detach())}")
        return image, value.reshape(())


class Run:
    """The progress of one optimisation: what is stored after each step, and what the result is made of."""

    def __init__(self, update: LatentUpdate, settings: dict[str, Any]) -> None:
        self.update = update
        self.settings = settings
        self.step = 0
        self.pair_losses: list[tuple[float, ...]] = []
        self.best_step = 0
        self.best_loss = float("inf")
        self.best_latents = list(update.latents)

    @property
    def losses(self) -> list[float]:
        return [sum(pair) / len(pair) for pair in self.pair_losses]

    def record(self, losses: tuple[float, ...]) -> None:
        self.pair_losses.append(losses)
        if self.losses[-1] < self.best_loss:
            self.best_loss, self.best_step, self.best_latents = self.losses[-1], self.step, list(self.update.latents)

    def save(self, home: Path) -> None:
        names = ("settings", "step", "pair_losses", "best_step", "best_loss", "best_latents")
        tree = {name: getattr(self, name) for name in names}
        runstate.save(home, {**tree, "update": self.update.state(), "random": runstate.random_state()}, self.step)

    def load(self, home: Path) -> None:
        tree = runstate.load(home)
        for name, value in self.settings.items():
            if tree["settings"].get(name) != value:
                raise ValueError(
                    f"resume: the run in {str(home)!r} had {name}={tree['settings'].get(name)!r}, got {value!r}; "
                    "pass what it was started with, or start anew in another folder"
                )
        self.step, self.best_step, self.best_loss = tree["step"], tree["best_step"], tree["best_loss"]
        self.pair_losses = [tuple(pair) for pair in tree["pair_losses"]]
        self.update.load(tree["update"])
        self.best_latents = [z.to(self.update.latents[0].device) for z in tree["best_latents"]]
        runstate.restore_random_state(tree["random"])

    def finish(self, objective: Objective) -> Result:
        x, y = self.update.latents
        losses, images = objective.value((x, y))
        final = sum(losses) / len(losses)
        best_step, best_loss, best, best_images = self.best_step, self.best_loss, (x, y), images
        if final <= best_loss:
            best_step, best_loss = self.step, final
        else:
            best = (self.best_latents[0], self.best_latents[1])
            _, best_images = objective.value(best)
        return Result((x, y), images, self.losses, self.pair_losses, final, best_step, best_loss, best, best_images)
