"""`doodl-fast demo`: DOODL on the embedded pipeline, in a few minutes on a CPU.

There are two tasks: CLIP guidance on a prompt of two objects that the pipeline gets wrong, and classifier guidance to a
fine-grained variety that captions cannot name. Each is done without guidance, with one-step classifier guidance (the
paper's baseline) and with DOODL. The pictures are judged by the guide's own loss and by a measure without networks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, options
from .checks import check_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from ..optimization.loop import StepInfo

GUIDANCE_SCALE = 4.0
MIX_WEIGHT = 0.7
"""EDICT's usual 0.93 is meant for 50 steps. With the few large steps of the demo x and y drift apart unless they are
mixed more strongly."""


@dataclass(frozen=True)
class Task:
    """One of the demo's two tasks.

    Attributes:
        name: A short name.
        title: What the figures call it.
        prompt: What the pipeline is asked for.
        seeds: One picture is made from each.
        learning_rate: The grad_scale of DOODL, for one picture.
        one_step_scale: The strength of one-step guidance.
        variety: What the classifier is asked for; None stands for CLIP guidance to the prompt itself.
    """

    name: str
    title: str
    prompt: str
    seeds: tuple[int, ...]
    learning_rate: float
    one_step_scale: float
    variety: str | None = None


TASKS = (
    Task(
        "clip",
        "CLIP guidance on a prompt of two objects",
        "a green circle above a purple circle",
        (0, 1, 2, 3),
        learning_rate=10.0,
        one_step_scale=10.0,
    ),
    Task(
        "classifier",
        'Classifier guidance to a variety that captions do not name: "6-pointed star"',
        "a red star",
        (0, 1, 2, 3),
        learning_rate=10.0,
        one_step_scale=10.0,
        variety="6-pointed star",
    ),
)


@dataclass
class Outcome:
    """The pictures that one method made for a task, and how they were judged.

    Attributes:
        method: The method's name.
        images: Pictures (N, 3, H, W) in [-1, 1], one for each seed.
        loss: The guide's loss of all of them.
        correct: For each picture, whether it shows all that was asked for, by the measure without networks.
        score: The mean share of what was asked for, by that measure.
        seconds: What the method took.
    """

    method: str
    images: Tensor = field(repr=False)
    loss: float
    correct: list[bool]
    score: float
    seconds: float


@dataclass
class TaskResult:
    """What came of one task.

    Attributes:
        task: The task.
        outcomes: One for each method.
        steps: Numbers of optimisation steps of DOODL, with the pictures of that step.
        losses: DOODL's losses, one for each step and the final one.
    """

    task: Task
    outcomes: list[Outcome]
    steps: list[tuple[int, Tensor]]
    losses: list[float]


def judge(task: Task, images: Tensor) -> tuple[list[bool], float]:
    """Judges pictures without networks: which are wholly right, and the mean share of what was asked for."""
    from .. import shapes

    verdicts = [shapes.judge(image, task.prompt, variety=task.variety) for image in images]
    return [v.correct for v in verdicts], sum(v.score for v in verdicts) / len(verdicts)


def guide(task: Task) -> Callable[[Tensor], Tensor]:
    """The loss that a task is optimised for."""
    from .. import shapes
    from ..guidance import Classifier, ClipText

    if task.variety is None:
        return ClipText(*shapes.load_clip(), task.prompt)
    return Classifier(*shapes.load_classifier(), task.variety)


def run_task(task: Task, pipeline: Any, num_inference_steps: int, num_optimization_steps: int) -> TaskResult:
    """Makes the pictures of a task with all three methods, and judges them."""
    import torch

    from ..optimization import one_step
    from ..optimization.loop import optimize
    from ..solvers.edict import EDICT

    chain = EDICT.from_pipeline(
        pipeline,
        task.prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=GUIDANCE_SCALE,
        memory="checkpoint",
        mix_weight=MIX_WEIGHT,
    )
    latents = torch.cat([chain.noise(seed) for seed in task.seeds])
    decode, loss = chain.decode, guide(task)
    outcomes = []

    def note(method: str, images: Tensor, start: float) -> None:
        seconds = time.perf_counter() - start
        correct, score = judge(task, images)
        outcomes.append(Outcome(method, images, float(loss(images)), correct, score, seconds))

    start = time.perf_counter()
    with torch.no_grad():
        note("no guidance", decode(chain(latents)[0]), start)
    start = time.perf_counter()
    guided = one_step(chain, latents, decode, loss, task.one_step_scale)[0]
    with torch.no_grad():
        note("one-step classifier guidance", decode(guided), start)

    steps: list[tuple[int, Tensor]] = []
    start = time.perf_counter()
    result = optimize(
        chain,
        latents,
        decode,
        loss,
        num_optimization_steps,
        # The loss is a mean over the pictures, so this gives each of them its full gradient.
        grad_scale=task.learning_rate * len(latents),
        clip_grad_value=CLIP_GRAD_VALUE,
        callback_on_step_end=lambda info: _keep(steps, info, num_optimization_steps),
    )
    with torch.no_grad():
        note("DOODL", result.images[0], start)
    return TaskResult(task, outcomes, steps, [*result.losses, result.final_loss])


CLIP_GRAD_VALUE = 1e-2
"""This is ten times the reference's value, as the demo takes a few large steps and the paper fifty small ones."""


def _keep(steps: list[tuple[int, Tensor]], info: StepInfo, total: int) -> None:
    """Keeps the pictures of a step that is a quarter, a half or three quarters of the way."""
    if info.step in {max(1, round(total * share)) for share in (0.25, 0.5, 0.75)}:
        steps.append((info.step, info.images[0]))


def table(result: TaskResult) -> str:
    """The outcomes of a task as a table for the terminal."""
    rows = [f"{result.task.title}\n  prompt: {result.task.prompt}"]
    rows.append(f"  {'':30}{'guide loss':>11}{'right':>8}{'score':>8}{'seconds':>9}")
    for o in result.outcomes:
        right = f"{sum(o.correct)}/{len(o.correct)}"
        rows.append(f"  {o.method:30}{o.loss:11.4f}{right:>8}{o.score:8.2f}{o.seconds:9.1f}")
    return "\n".join(rows)


def describe(image: Tensor, task: Task) -> str:
    """Names the objects that the measure without networks finds in a picture, from left to right."""
    from .. import shapes

    found = sorted(shapes.read(image)[:3], key=lambda reading: reading.x)
    names = [f"{r.colour or '?'} {(r.variety if task.variety else r.shape) or '?'}" for r in found]
    return ",\n".join(names) or "nothing"


def contact_sheet(results: list[TaskResult], path: Path) -> None:
    """Draws the pictures of all tasks side by side, with one row for each seed.

    The columns are: without guidance, steps on the way, after DOODL, and one-step guidance for comparison. Below each
    picture stands what the measure without networks finds in it.
    """
    from matplotlib.figure import Figure

    from .. import shapes

    rows = max(len(r.task.seeds) for r in results)
    columns = 3 + len(results[0].steps)
    figure = Figure(figsize=(1.3 * columns * len(results), 1.62 * rows + 0.75))
    parts = figure.subfigures(1, len(results), squeeze=False)[0]
    for part, result in zip(parts, results, strict=True):
        before, baseline, after = result.outcomes
        strip = [("before:\nno guidance", before.images)]
        strip += [(f"DOODL,\nstep {step}", images) for step, images in result.steps]
        strip += [("after:\nDOODL", after.images), ("for comparison:\none-step guidance", baseline.images)]
        part.suptitle(f'{result.task.title}\nprompt: "{result.task.prompt}"', fontsize=10)
        for row, cells in enumerate(part.subplots(rows, columns, squeeze=False)):
            for axis, (title, images) in zip(cells, strip, strict=True):
                image = images[row]
                axis.imshow((image.clamp(-1, 1).permute(1, 2, 0).float().cpu().numpy() + 1) / 2)
                right = shapes.judge(image, result.task.prompt, variety=result.task.variety).correct
                axis.set_xlabel(describe(image, result.task), fontsize=6.5, color="#1a7f37" if right else "#b42318")
                axis.set_xticks([])
                axis.set_yticks([])
                if row == 0:
                    axis.set_title(title, fontsize=7.5)
        part.subplots_adjust(top=0.85, bottom=0.06, hspace=0.32, wspace=0.08, left=0.02, right=0.98)
    files.replace(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def loss_curves(results: list[TaskResult], path: Path) -> None:
    """Draws DOODL's loss against the optimisation step for each task, beside the loss of one-step guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(results), 3.4), layout="constrained")
    for axis, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        axis.plot(result.losses, marker="o", markersize=3, label="DOODL")
        axis.axhline(result.outcomes[1].loss, color="#b54708", linestyle="--", label="one-step guidance")
        axis.set(title=f'{result.task.name}: "{result.task.prompt}"', xlabel="optimisation step", ylabel="guide loss")
        axis.title.set_fontsize(9)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    files.replace(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def run_tasks(out: Path, num_inference_steps: int, num_optimization_steps: int) -> list[TaskResult]:
    """Runs both tasks, prints their tables, and writes the pictures and a JSON file of the numbers to the folder."""
    from .. import shapes

    started = time.perf_counter()
    pipeline = shapes.load_pipeline()
    results = []
    for task in TASKS:
        print(f"\n{task.title} ...", flush=True)
        results.append(run_task(task, pipeline, num_inference_steps, num_optimization_steps))
        print(table(results[-1]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(results, out / "contact_sheet.png")
    loss_curves(results, out / "losses.png")
    figures = [
        {
            "task": asdict(r.task),
            "losses": r.losses,
            "outcomes": [{k: v for k, v in vars(o).items() if k != "images"} for o in r.outcomes],
        }
        for r in results
    ]
    files.write_json(out / "figures.json", figures)
    seconds = time.perf_counter() - started
    print(f"\n`right` and `score` are read off the pixels without any network. It took {seconds:.0f} s in all.")
    print(f"pictures: {out / 'contact_sheet.png'}, {out / 'losses.png'}; figures: {out / 'figures.json'}")
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--out", type=options.folder, default=Path("demo"), help="folder for the pictures")
    parser.add_argument("--steps", type=options.integer(), help="diffusion steps (default: the demo's own)")
    parser.add_argument("--optimization-steps", type=options.integer(), help="(default: the demo's own)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; gives the exit code."""
    from ..optimization.arguments import check_steps

    options.check_folder(args.out)
    options.quiet_libraries()
    steps = [12 if count is None else count for count in (args.steps, args.optimization_steps)]
    check_sizes(argparse.Namespace(model=options.EMBEDDED, guidance_scale=GUIDANCE_SCALE), steps[:1], option="--steps")
    check_steps(steps[1])
    run_tasks(args.out, *steps)
    return 0
