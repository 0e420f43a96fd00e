"""Makes a picture that resembles another one in CLIP's eyes (the third task of DOODL, arXiv 2303.13703).

    python examples/image_conditioned.py

The prompt asks for a star, and the reference picture shows one with six points, for which captions have no name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import doodl_fast
from doodl_fast import guidance, shapes


def main(argv: list[str] | None = None) -> doodl_fast.Result:
    """Runs the example and returns what `optimize` found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red star")
    parser.add_argument("--variety", default="6-pointed star", choices=shapes.VARIETY_NAMES, help="of the reference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--optimization-steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("examples/out/image_conditioned"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    thing = shapes.Object("red", args.variety, 32, 32, 14)
    scene = shapes.Scene(shapes.Prompt.parse(args.prompt), (thing,))
    reference = torch.from_numpy(shapes.render(scene).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    doodl_fast.ImageTensor(reference).save(args.out / "reference.png")

    chain = doodl_fast.DDIM.from_pipeline(shapes.load_pipeline(), args.prompt, num_inference_steps=args.steps)
    model, processor = shapes.load_clip()
    loss = guidance.ClipImage(model, reference, processor)
    result = doodl_fast.optimize(
        chain, chain.noise(seed=args.seed), chain.decode, loss, args.optimization_steps, grad_scale=30.0
    )
    result.best_images[0].save(args.out / "after.png")
    faults = shapes.judge(result.best_images[0][0], args.prompt, variety=args.variety).faults
    print(f"distance to the reference: {result.losses[0]:.4f} at first, {result.best_loss:.4f} at best")
    print(f"judged by the measure without networks: {', '.join(faults) or 'all is right'}")
    return result


if __name__ == "__main__":
    main()
