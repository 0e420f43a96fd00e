"""DOODL on a pipeline (arXiv 2303.13703): optimises the starting noise until CLIP finds the prompt in the picture.

    python examples/doodl.py
    python examples/doodl.py --model FOLDER_OR_HUB_ID --clip openai/clip-vit-base-patch32 --prompt "a dog with a hat"

Without --model it runs on the small pipeline that comes with doodl_fast, whose pictures show coloured shapes, and
judges them by a measure that uses no network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import doodl_fast
from doodl_fast import guidance, shapes


def main(argv: list[str] | None = None) -> doodl_fast.Result:
    """Runs the example and returns what `optimize` found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id of a diffusers pipeline")
    parser.add_argument("--clip", help="a folder or hub id of a CLIP model, with --model")
    parser.add_argument("--prompt", default="a green circle above a purple circle")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--optimization-steps", type=int, default=15)
    parser.add_argument("--grad-scale", type=float, default=10.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("examples/out/doodl"))
    args = parser.parse_args(argv)
    if (args.model is None) != (args.clip is None):
        parser.error("--model and --clip belong together: the embedded CLIP model knows coloured shapes alone")

    options = {"num_inference_steps": args.steps}
    if args.model is None:
        chain = doodl_fast.DDIM.from_pipeline(shapes.load_pipeline(args.device), args.prompt, **options)
        loss = guidance.ClipText(*shapes.load_clip(args.device), args.prompt)
    else:
        chain = doodl_fast.DDIM.from_pretrained(args.model, args.prompt, device=args.device, **options)
        loss = guidance.ClipText.from_pretrained(args.clip, args.prompt, device=args.device, num_cutouts=8)

    result = doodl_fast.optimize(
        chain,
        chain.noise(seed=args.seed),
        chain.decode,
        loss,
        args.optimization_steps,
        grad_scale=args.grad_scale,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (before,) = chain(chain.noise(seed=args.seed))
    doodl_fast.ImageTensor(chain.decode(before)).save(args.out / "before.png")
    result.best_images[0].save(args.out / "after.png")
    print(f"loss: {result.losses[0]:.4f} at first, {result.best_loss:.4f} at best, in step {result.best_step}")
    if args.model is None:
        for name, image in (("before", chain.decode(before)), ("after", result.best_images[0])):
            faults = shapes.judge(image[0].detach(), args.prompt).faults
            print(f"{name}: {', '.join(faults) or 'all is right'}")
    return result


if __name__ == "__main__":
    main()
