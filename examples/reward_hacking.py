"""Shows what becomes of pictures when only the guide counts, and what regularisers of the noise change about that.

    python examples/reward_hacking.py

CLIP is asked for another colour than the prompt: the noise is optimised with nothing that keeps it noise, so the score
rises although pictures get worse. How many pictures still show one thing of the prompt's or of the asked colour is said
by a measure that has no network. Each row is the same optimisation from the same noise, with another regulariser.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import doodl_fast
from doodl_fast import guidance, shapes
from doodl_fast.shapes.scenes import COLOURS, SHAPES

ROWS: dict[str, Any] = {
    "no regulariser": None,
    "NoiseNorm, 0.1 (ReNO)": lambda start: (guidance.NoiseNorm(), 0.1),
    "NoiseProbability, 1 (DNO)": lambda start: (guidance.NoiseProbability(), 1.0),
    "Whiteness, 100": lambda start: (guidance.Whiteness(), 100.0),
    "StartDistance, 0.03": lambda start: (guidance.StartDistance(start), 0.03),
}


def texts(count: int) -> tuple[list[str], list[str]]:
    """Prompts of one object, and the same with the next colour, which CLIP is asked for."""
    colours, forms = list(COLOURS), list(SHAPES)
    pairs = [(i % len(colours), forms[(i + i // len(colours)) % len(forms)]) for i in range(count)]
    prompts = [f"a {colours[colour]} {form}" for colour, form in pairs]
    return prompts, [f"a {colours[(colour + 1) % len(colours)]} {form}" for colour, form in pairs]


def share(images: Tensor, *lists: list[str]) -> float:
    """The share of pictures that show what one of their texts says, by the measure without networks."""
    right = [
        any(shapes.judge(image, text).correct for text in row)
        for image, row in zip(images, zip(*lists, strict=True), strict=True)
    ]
    return sum(right) / len(right)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Runs the example. Returns a row of numbers for the noise as it was drawn, and one for each regulariser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt")
    parser.add_argument("--steps", type=int, default=6, help="sampling steps")
    parser.add_argument("--optimization-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.3)
    parser.add_argument("--rows", type=int, nargs="+", choices=range(len(ROWS)), default=list(range(len(ROWS))))
    parser.add_argument("--out", type=Path, default=Path("examples/out/reward_hacking"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    prompts, asked = (names * args.seeds for names in texts(args.prompts))
    chain = doodl_fast.DDIM.from_pipeline(shapes.load_pipeline(), prompts, num_inference_steps=args.steps)
    score = guidance.TextScore(*shapes.load_clip(), asked)
    start = chain.noise(seed=0, batch=len(prompts))
    size = start[0].numel() ** 0.5

    def row(name: str, latents: Tensor, images: Tensor, value: float) -> dict[str, float]:
        doodl_fast.ImageTensor(images.detach()).save(args.out / f"{name.split(',')[0].replace(' ', '_')}.png")
        found = {
            "score": value,
            "prompt": share(images, prompts),
            "either": share(images, prompts, asked),
            "length": float(latents.flatten(1).norm(dim=1).mean()) / size,
        }
        print(
            f"{name}: CLIP's score {value:.2f}, shows the prompt {found['prompt']:.0%}, the prompt or what was asked "
            f"for {found['either']:.0%}, length of the noise {found['length']:.2f}",
            flush=True,
        )
        return found

    with torch.no_grad():
        images = chain.decode(chain(start)[0])
        rows = {"before": row("before", start, images, -float(score(images)))}
    for name, make in [list(ROWS.items())[number] for number in args.rows]:
        losses: dict[str, Any] = {"clip": score} if make is None else {"clip": score, "noise": make(start)}
        result = doodl_fast.optimize(
            chain,
            start,
            chain.decode,
            losses,
            args.optimization_steps,
            optimizer=lambda p: torch.optim.Adam(p, lr=args.learning_rate),
            clip_grad_value=None,
            renormalize_latents=False,
            perturbation_scale=0.0,
            progress=False,
        )
        images = result.images[0]
        rows[name] = row(name, result.latents[0], images, -float(score(images)))
    return rows


if __name__ == "__main__":
    main()
