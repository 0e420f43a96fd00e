"""What each solver costs and how good its pictures are, on the embedded pipeline; and how stable each is.

    python bench/solvers.py [--out solvers.json] [--prompts 40] [--seeds 4] [--steps 4 8 20 50] [--rounds 3] [--quick]
    python bench/solvers.py --pictures     # right pictures alone, which does not depend on what else the machine does
    python bench/solvers.py --cost         # seconds and memory alone
    python bench/solvers.py --stability    # the growth of perturbations alone
    python bench/solvers.py --truncated    # errors of truncated gradients, DDIM with 20 steps

A row is one solver with one number of steps: the seconds of a gradient (CPU time, beside EDICT's measured in turn, as
other programs may be busy), its peak memory, how many pictures are wholly right by the measure without networks
(`doodl_fast.shapes.judge`), and how perturbations grow. The results are written to a JSON file after every row, and
every seed of a row, and a run that was stopped goes on where it was, also with more seeds or other parts of the rows.
The tables of docs/solvers.md, of all rows in the file, are printed at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import doodl_fast
from doodl_fast import shapes
from doodl_fast.chain.memory.tracker import Tracker

GUIDANCE_SCALE = 4.0
PERTURBATION = 1e-3
"""Of each value of the latents, which have unit variance. Large enough for a network in float32."""
STARTS = 4
"""How many starts the growth of perturbations is a median of."""
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "EDICT": (doodl_fast.EDICT, {}),
    "DDIM": (doodl_fast.DDIM, {}),
    "BDIA": (doodl_fast.BDIA, {}),
    "BDIA, gamma 0.5": (doodl_fast.BDIA, {"gamma": 0.5}),
    "O-BELM": (doodl_fast.OBELM, {}),
    "DPM++ 2M": (doodl_fast.DPMSolver, {}),
    "UniPC": (doodl_fast.UniPC, {}),
    "Rex, Euler": (doodl_fast.Rex, {"scheme": "euler"}),
    "Rex, midpoint": (doodl_fast.Rex, {"scheme": "midpoint"}),
    "Rex, RK4": (doodl_fast.Rex, {"scheme": "rk4"}),
    "Rex SDE, Euler": (doodl_fast.RexSDE, {"scheme": "euler"}),
}


def make(pipe: Any, name: str, steps: int, prompts: list[str]) -> Any:
    """The chain of a solver for a batch of prompts."""
    solver, options = SOLVERS[name]
    return solver.from_pipeline(pipe, prompts, "", steps, GUIDANCE_SCALE, memory="checkpoint", **options)


def start(chain: Any, seed: int = 0) -> Tensor:
    """The starting noise. A chain whose steps add noise gets that too."""
    x: Tensor = chain.noise(seed)
    if hasattr(chain, "draw_noise"):
        chain.step_noise = chain.draw_noise(x, seed + 10**6)
    return x


def gradient(chain: Any, x: Tensor) -> Tensor:
    """The gradient of a simple loss of the pictures that the chain makes."""
    leaf = x.clone().requires_grad_()
    loss = torch.stack([end.square().sum() for end in chain(leaf)[: chain.num_pictures]]).sum()
    return torch.autograd.grad(loss, leaf)[0]


def cost(pipe: Any, name: str, steps: int, rounds: int) -> dict[str, float]:
    """Seconds of CPU time of a gradient, its ratio to EDICT's, and the most bytes that were alive in it."""
    chains = {key: make(pipe, key, steps, ["a red circle"]) for key in (name, "EDICT")}
    x = start(chains[name])
    with Tracker("cpu") as tracker:
        gradient(chains[name], x)
    seconds: dict[str, list[float]] = {key: [] for key in chains}
    for _ in range(rounds):
        for key, chain in chains.items():
            began = time.process_time()
            gradient(chain, x)
            seconds[key].append(time.process_time() - began)
    ratios = [mine / edict for mine, edict in zip(seconds[name], seconds["EDICT"], strict=True)]
    calls = chains[name].num_network_calls
    return {
        "calls": calls,
        "seconds": statistics.median(seconds[name]),
        "ratio to EDICT": statistics.median(ratios),
        "peak": tracker.peak,
    }


@torch.no_grad()
def right_pictures(pipe: Any, name: str, steps: int, prompts: list[str], seed: int) -> int:
    """How many pictures of the prompts, all from one seed, are wholly right. Latents that are not finite are wrong."""
    chain = make(pipe, name, steps, prompts)
    try:
        latents = chain(start(chain, seed))[0]
    except FloatingPointError:
        return 0
    images = chain.decode(latents.nan_to_num(0).clamp(-100, 100))
    return sum(shapes.judge(image, prompt).correct for image, prompt in zip(images, prompts, strict=True))


@torch.no_grad()
def stability(pipe: Any, name: str, steps: int) -> dict[str, float | None]:
    """How much a small change of the start has grown in the picture, and how far the two latents of a pair part.

    Each is a median over `STARTS` starts. "first" is the growth of a change of the noise. "second" is that of a change
    of the second latent alone, where a solver has one: EDICT's y, Rex's w, and what BDIA and O-BELM start from 0.
    """
    chain = make(pipe, name, steps, ["a red circle"] * STARTS)
    x = start(chain).double()
    if hasattr(chain, "step_noise") and chain.step_noise is not None:
        chain.step_noise = [z.double() for z in chain.step_noise]
    change = PERTURBATION * torch.randn(x.shape, generator=torch.Generator().manual_seed(99), dtype=x.dtype)

    def grown(after: Tensor, before: Tensor) -> float:
        return float(((after - before).flatten(1).norm(dim=1) / change.flatten(1).norm(dim=1)).median())

    ends = chain(x)
    found: dict[str, float | None] = {"first": grown(chain(x + change)[0], ends[0]), "second": None, "apart": None}
    if len(ends) == 2:
        # EDICT and Rex start from y = x, the others from y = 0.
        is_pair = isinstance(chain, (doodl_fast.EDICT, doodl_fast.Rex))
        second = x if is_pair else torch.zeros_like(x)
        found["second"] = grown(chain(x, second + change)[0], ends[0])
        if is_pair:
            apart = (ends[0] - ends[1]).flatten(1).norm(dim=1) / ends[0].flatten(1).norm(dim=1)
            found["apart"] = float(apart.median())
    return found


def chosen_prompts(count: int) -> list[str]:
    """Half of them of one object and half of two, always the same."""
    rng = random.Random(0)
    one, two = list(shapes.prompts(1)), list(shapes.prompts(2))
    return [str(prompt) for prompt in (*rng.sample(one, count - count // 2), *rng.sample(two, count // 2))]


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows, prompts = results["rows"], results["setting"]["prompts"]
    steps = sorted({row["steps"] for row in rows})
    seeds = max((len(row.get("right", [])) for row in rows), default=0)
    by = {(row["solver"], row["steps"]): row for row in rows}

    def table(title: str, key: str, show: Any) -> list[str]:
        if not any(key in row for row in rows):
            return []
        lines = [
            f"{title}:",
            "",
            f"| solver | {' | '.join(f'{n} steps' for n in steps)} |",
            "|---" * (len(steps) + 1) + "|",
        ]
        for name in SOLVERS:
            cells = [show(by[name, n]) if key in by.get((name, n), {}) else "" for n in steps]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return [*lines, ""]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2g}"

    def right(row: dict[str, Any]) -> str:
        counts = row["right"]
        return str(sum(counts)) if len(counts) == seeds else f"{sum(counts)} of {prompts * len(counts)}"

    return "\n".join(
        [
            *table(f"Right pictures, of {prompts * seeds} ({prompts} prompts x {seeds} seeds)", "right", right),
            *table("CPU seconds of a gradient, and their ratio to EDICT's in the same run", "seconds",
                   lambda row: f"{row['seconds']:.2f} ({row['ratio to EDICT']:.2f})"),
            *table("Network calls of a forward run, and the peak memory of a gradient in MiB", "peak",
                   lambda row: f"{row['calls']}, {row['peak'] / 2**20:.1f}"),
            *table("Growth of a change of the starting noise", "first", lambda row: number(row["first"])),
            *table("Growth of a change of the second latent alone", "second", lambda row: number(row["second"])),
            *table("Distance of the two latents at the end, relative", "apart", lambda row: number(row["apart"])),
        ]
    )  # fmt: skip


def truncated(pipe: Any, steps: int = 20, seeds: int = 8) -> str:
    """The error of truncated gradients against the whole one, as Markdown: medians over the seeds.

    The loss is the mean squared distance of the picture from another one, of the same solver and another prompt.
    """
    chain = make(pipe, "DDIM", steps, ["a red circle"])
    with torch.no_grad():
        other = make(pipe, "DDIM", steps, ["a blue square"])
        goal = other.decode(other(other.noise(seed=99))[0])

    def pull(seed: int, last: Any) -> Tensor:
        chain.last_steps = last
        leaf = chain.noise(seed).requires_grad_()
        loss = (chain.decode(chain(leaf)[0]) - goal).square().mean()
        return torch.autograd.grad(loss, leaf)[0].flatten().double()

    whole = [pull(seed, None) for seed in range(seeds)]
    lines = ["| the gradient goes through | cosine | length | relative error |", "|---|---|---|---|"]
    kinds: dict[str, list[Any]] = {
        f"the last {k} of {steps} steps": [doodl_fast.LastSteps(k)] * seeds for k in (1, 2, 5, 10, 15, steps)
    }
    kinds[f"1 to {steps} steps, drawn"] = [doodl_fast.LastSteps(1, steps, seed) for seed in range(seeds)]
    for copies in (2, 8):
        name = f"the last step, DRaFT-LV with {copies} copies"
        kinds[name] = [doodl_fast.LowVariance(copies, seed) for seed in range(seeds)]
    kinds["the first call, straight through"] = [doodl_fast.StraightThrough()] * seeds
    for name, lasts in kinds.items():
        found = [pull(seed, last) for seed, last in enumerate(lasts)]
        pairs = list(zip(found, whole, strict=True))
        cosine = statistics.median(float(torch.nn.functional.cosine_similarity(f, w, 0)) for f, w in pairs)
        length = statistics.median(float(f.norm() / w.norm()) for f, w in pairs)
        error = statistics.median(float((f - w).norm() / w.norm()) for f, w in pairs)
        lines.append(f"| {name} | {cosine:.2f} | {length:.2g} | {error:.2g} |")
    return "\n".join(lines)


def measure(pipe: Any, row: dict[str, Any], parts: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row with those parts measured that it lacks, after each of them and after each seed of the pictures."""
    name, steps = row["solver"], row["steps"]
    if "cost" in parts and "seconds" not in row:
        row = row | cost(pipe, name, steps, args.rounds)
        yield row
    if "stability" in parts and "first" not in row:
        row = row | stability(pipe, name, steps)
        yield row
    if "pictures" in parts:
        prompts = chosen_prompts(args.prompts)
        for seed in range(len(row.get("right", [])), args.seeds):
            row = row | {"right": [*row.get("right", []), right_pictures(pipe, name, steps, prompts, seed)]}
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost, pictures and stability by solver.")
    parser.add_argument("--out", type=Path, default=Path("solvers.json"))
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20, 50])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--pictures", action="store_true", help="only count the right pictures")
    parser.add_argument("--cost", action="store_true", help="only measure seconds and memory")
    parser.add_argument("--stability", action="store_true", help="only measure the growth of perturbations")
    parser.add_argument("--truncated", action="store_true", help="print the errors of truncated gradients instead")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 1 seed, 1 round, 4 steps")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.seeds, args.rounds, args.steps = 2, 1, 1, [4]
    torch.set_num_threads(1)
    if args.truncated:
        print(truncated(shapes.load_pipeline()))
        return
    setting = {"prompts": args.prompts}
    results: dict[str, Any] = {"setting": setting, "rows": []}
    if args.out.exists():
        results = json.loads(args.out.read_text())
        if results["setting"] != setting:
            parser.error(f"{args.out} has rows of another setting, {results['setting']}; name another file by --out")
    every = ["cost", "stability", "pictures"]
    parts = [name for name in every if getattr(args, name)] or every
    pipe = shapes.load_pipeline()
    rows = {(row["solver"], row["steps"]): row for row in results["rows"]}
    for steps in args.steps:
        for name in args.solvers:
            before = rows.get((name, steps), {"solver": name, "steps": steps})
            for row in measure(pipe, before, parts, args):
                rows[name, steps] = row
                results["rows"] = list(rows.values())
                partial = args.out.with_suffix(".part")
                partial.write_text(json.dumps(results, indent=1))
                partial.replace(args.out)
                print(row, flush=True)
    print(tables(results))


if __name__ == "__main__":
    main()
