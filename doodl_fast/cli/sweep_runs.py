"""Does one run of a sweep, whatever its method. Networks are loaded once in a process."""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sweep.plan import Run
from ..sweep.table import COLUMNS
from . import options
from . import run as run_command
from .families import frames_decoder
from .files import write_picture
from .guide_models import key_of, load_guide
from .guides import guides
from .losses import load_function, make_losses
from .solvers import make_chain
from .sweep_options import namespace

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..optimization.losses import Losses
    from ..solvers.base import DiffusionChain

STATE, BEFORE, AFTER, BEST = "state", "before.png", "after.png", "best.png"
SHAPES = "shapes"
Measure = Callable[["Tensor", str, Mapping[str, Any]], Any]


class Performer:
    """Does runs, one after the other: ``performer(run, folder, check)``, see `doodl_fast.sweep.work`.

    Args:
        measures: Names of measures that judge the last picture: "shapes", which reads the embedded model's pictures
            without a network, or MODULE:FUNCTION, a function of the picture (3, H, W) in [-1, 1], the prompt and the
            run's options that returns a number or a dict of numbers.
        device: What --device is.

    Raises:
        ValueError: A measure cannot be found.
    """

    def __init__(self, measures: Sequence[str] = (), device: str | None = None) -> None:
        self.device = device
        self.measures = [find_measure(name) for name in measures]
        self._pipelines: dict[Any, Any] = {}
        self._guides: dict[Any, tuple[Any, Any]] = {}
        self._makers = guides(self._load_guide)

    def __call__(self, run: Run, folder: Path, check: Callable[[], None]) -> dict[str, Any]:
        """Does a run, or the rest of it, and returns its result."""
        import torch

        from .. import __version__
        from ..diffusion.images import open_picture
        from ..optimization.losses import Losses

        args = namespace(run, self.device)
        run_command.check_and_fill(args)
        device, dtype = options.find_device(args.device), options.find_dtype(args.dtype)
        losses = Losses.of(make_losses(args, self._makers, device, dtype))
        chain = make_chain(
            args,
            self._pipeline(args),
            memory=args.memory,
            memory_budget=args.memory_budget,
            arithmetic=args.arithmetic,
        )
        torch.manual_seed(run.seed)  # The losses' random cutouts come from the global generator.
        found = _Doing(args, chain, losses, folder, check).result()
        # Pictures are judged as they are stored, as the first one is not there any more in a run that was interrupted.
        before, after = (open_picture(folder / name).float() for name in (BEFORE, AFTER))
        judged: dict[str, float] = {}
        for measure in self.measures:
            judged |= _numbers(measure(after[0], run.prompt, run.options))
        about = {name: getattr(run, name) for name in ("prompt", "seed", "guide", "method", "setting")}
        versions = {"doodl_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
        distance = float((after - before).square().mean().sqrt() / 2)
        return {**about, **found, "distance": distance, "measures": judged, "versions": versions}

    def _pipeline(self, args: argparse.Namespace) -> Any:
        """The diffusers pipeline of a run."""
        key = (args.model, args.variant, args.device, args.dtype)
        if key not in self._pipelines:
            self._pipelines[key] = options.load_pipeline(args)
        return self._pipelines[key]

    def _load_guide(
        self, guide: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Any]:
        """The model of a guide and its processor."""
        key = (*key_of(args, guide), device, dtype)
        if key not in self._guides:
            self._guides[key] = load_guide(guide, args, device, dtype)
        return self._guides[key]


class _Doing:
    """One run while it is done."""

    def __init__(
        self,
        args: argparse.Namespace,
        chain: DiffusionChain,
        losses: Losses,
        folder: Path,
        check: Callable[[], None],
    ) -> None:
        self.args, self.chain, self.losses, self.folder, self.check = args, chain, losses, folder, check
        self.latents = run_command.draw_noise(chain, args.seed)
        self.decode, self.frames = frames_decoder(chain)
        self.resume = (folder / STATE / "state.json").exists()

    def result(self) -> dict[str, Any]:
        """The result. The pictures are written."""
        kinds = {
            "optimize": self._optimize,
            "none": self._none,
            "best-of": self._best_of,
            "one-step": self._one_step,
        }
        return kinds[self.args.kind]()

    def _optimize(self) -> dict[str, Any]:
        from ..optimization.loop import optimize

        def note(info: Any) -> None:
            self.check()
            if info.step == 0:
                self._write(BEFORE, info.images[0])

        result = optimize(
            self.chain,
            self.latents,
            self.decode,
            self.losses,
            self.args.optimization_steps,
            **run_command.update_options(self.args),
            variables=self.args.variables,
            patience=self.args.patience,
            callback_on_step_end=note,
            progress=False,
            folder=self.folder / STATE,
            resume=self.resume,
        )
        self._write(AFTER, result.images[0])
        self._write(BEST, result.best_images[0])
        return {
            "loss_before": result.losses[0],
            "loss_after": result.final_loss,
            "loss_best": result.best_loss,
            "best_step": result.best_step,
            "losses": [*result.losses, result.final_loss],
            "history": result.history,
        }

    def _none(self) -> dict[str, Any]:
        image, loss = self._plain()
        return self._ended(image, loss, image, loss, [loss])

    def _best_of(self) -> dict[str, Any]:
        from ..optimization.searching import search

        found = search(
            self.chain,
            self.latents,
            self.decode,
            self.losses,
            self.args.best_of,
            first_image_only=self.args.first_image_only,
            seed=self.args.seed,
            folder=self.folder / STATE,
            resume=self.resume,
            callback_on_start_end=lambda number, loss: self.check(),
        )
        before, _ = self._plain()
        return self._ended(before, found.losses[0], found.images[0], min(found.losses), found.losses, found.best)

    def _one_step(self) -> dict[str, Any]:
        import torch

        from ..optimization.one_step_guidance import one_step

        before, first = self._plain()
        self.check()
        given = self._given(self.latents)
        ends = one_step(self.chain, self.latents, self.decode, given, self.args.one_step_scale)
        with torch.no_grad():
            image, loss = self._score(ends)
        return self._ended(before, first, image, loss, [first, loss], 1)

    def _plain(self) -> tuple[Tensor, float]:
        """The picture without guidance, and its loss."""
        import torch

        with torch.no_grad():
            return self._score(self.chain(self.latents))

    def _score(self, ends: Sequence[Tensor]) -> tuple[Tensor, float]:
        """The picture of final latents, and their loss: that of both pictures where a chain makes two."""
        count = 1 if self.args.first_image_only else getattr(self.chain, "num_pictures", 2)
        images = [self.decode(end) for end in ends[:count]]
        values = [float(self._given(end)(image)) for end, image in zip(ends, images, strict=False)]
        return images[0], sum(values) / len(values)

    def _given(self, end: Tensor) -> Losses:
        """The losses, which get what they may name."""
        noise = getattr(self.chain, "step_noise", None)
        return self.losses.with_given(start=self.latents, latents=end, noise=noise, prompts=self.chain.prompts)

    def _ended(
        self, before: Tensor, first: float, after: Tensor, last: float, losses: list[float], best_step: int = 0
    ) -> dict[str, Any]:
        """The result of a method without optimisation steps. Its best picture is the last one."""
        for name, image in ((BEFORE, before), (AFTER, after), (BEST, after)):
            self._write(name, image)
        return {
            "loss_before": first,
            "loss_after": last,
            "loss_best": last,
            "best_step": best_step,
            "losses": losses,
            "history": {},
        }

    def _write(self, name: str, image: Tensor) -> None:
        """Writes a picture, or the frames of a video side by side."""
        write_picture(self.folder / name, image, self.frames)


def find_measure(name: str) -> Measure:
    """The measure of a name.

    Raises:
        ValueError: There is none.
    """
    if name == SHAPES:
        return _shapes
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"measures: expected {SHAPES!r} or MODULE:FUNCTION, got {name!r}")
    try:
        return load_function(module, function)
    except ValueError as error:
        raise ValueError(str(error).replace("--loss:", "measures:")) from error


def _shapes(image: Tensor, prompt: str, given: Mapping[str, Any]) -> dict[str, float]:
    """Whether a picture shows all that its prompt asks for, and the share of that, read off the pixels."""
    from .. import shapes

    label = given.get("label")
    verdict = shapes.judge(image, prompt, variety=label if label in shapes.VARIETY_NAMES else None)
    return {"right": float(verdict.correct), "score": verdict.score}


def _numbers(value: Any) -> dict[str, float]:
    """What a measure returned, as numbers by name."""
    named = value if isinstance(value, Mapping) else {"measure": value}
    numbers = {str(name): float(number) for name, number in named.items()}
    taken = next((name for name in numbers if name in COLUMNS), None)
    if taken is not None:
        raise ValueError(f"measures: expected other names than the table has, got {taken!r}")
    wrong = next((name for name, number in numbers.items() if not math.isfinite(number)), None)
    if wrong is not None:
        raise ValueError(f"measures: expected finite numbers, got {named[wrong]!r} as {wrong}")
    return numbers
