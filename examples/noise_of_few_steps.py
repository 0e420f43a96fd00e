"""Optimises all noise of a chain of four steps for CLIP, against the starting noise alone and the best of many starts.

    python examples/noise_of_few_steps.py

The chain is the pipeline's scheduler with four ancestral steps, three of which add noise. Each way is measured by CLIP,
which is optimised, and by how many pictures show what the prompt says by a measure that uses no network.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import doodl_fast
from doodl_fast import shapes
from doodl_fast.optimization import search


def right(images: Any, prompt: str) -> float:
    """Returns the share of the pictures that show the prompt, by `shapes.judge`."""
    return sum(shapes.judge(image, prompt).correct for image in images) / len(images)


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Runs the example. Returns for each way its CLIP loss and the share of right pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red circle above a blue square")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--optimization-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=Path("examples/out/noise_of_few_steps"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    chain = doodl_fast.Sampler.from_pipeline(
        shapes.load_pipeline(), args.prompt, num_inference_steps=4, guidance_scale=4.0, eta=1.0
    )
    start = chain.noise(seed=0, batch=args.pictures)
    chain.step_noise = chain.draw_noise(start, seed=1)
    loss = doodl_fast.guidance.ClipText(*shapes.load_clip(), args.prompt)
    adam: dict[str, Any] = {"lr": args.learning_rate}
    ways = {
        "start alone": {"start": {"optimizer": torch.optim.Adam, **adam}},
        "all noise": {"start": {"optimizer": torch.optim.Adam, **adam}, "noise": adam},
    }
    found: dict[str, tuple[float, float]] = {}
    # A gradient evaluates each call once more with its VJP, so as many starts cost about as much.
    best = search(chain, start, chain.decode, loss, best_of=3 * args.optimization_steps, per_sample=True)
    pictures = {"best of many": (best.loss, best.images[0])}
    for name, variables in ways.items():
        result = doodl_fast.optimize(
            chain,
            start,
            chain.decode,
            loss,
            args.optimization_steps,
            variables=variables,
            per_sample=True,
            clip_grad_value=None,
            perturbation_scale=0.0,
        )
        before = sum(sample.losses[0] for sample in result.samples) / len(result.samples)
        pictures.setdefault("nothing", (before, chain.decode(chain(start)[0])))
        pictures[name] = (result.best_loss, result.best_images[0])
    for name, (value, images) in pictures.items():
        found[name] = (value, right(images, args.prompt))
        doodl_fast.ImageTensor(images.detach()).save(args.out / f"{name.replace(' ', '_')}.png")
        print(f"{name}: CLIP loss {value:.4f}, right {found[name][1]:.0%}")
    return found


if __name__ == "__main__":
    main()
