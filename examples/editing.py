"""Edits a picture exactly: EDICT (arXiv 2211.12446) takes it to noise, and back under another prompt.

    python examples/editing.py

In exact arithmetic the way to the noise and back under the same prompt loses no bit, which is checked first. The
command line does the same with picture files: `doodl-fast invert` and `doodl-fast generate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import doodl_fast
from doodl_fast import shapes
from doodl_fast.diffusion.images import open_picture


def main(argv: list[str] | None = None) -> dict[str, bool]:
    """Runs the example. Returns whether the bits came back, and whether the edited picture shows what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="a red circle", help="what the picture shows")
    parser.add_argument("--target", default="a blue circle", help="what it shall show")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--strength", type=float, default=0.8, help="the part of the schedule that is undone")
    parser.add_argument("--out", type=Path, default=Path("examples/out/editing"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    # A picture that no network has made. With a picture of yours, only these lines change.
    circle = shapes.Object("red", "disc", 32, 31, 14)
    picture = shapes.render(shapes.Scene(shapes.Prompt.parse(args.source), (circle,)))
    Image.fromarray(picture).save(args.out / "picture.png")
    pixels = open_picture(args.out / "picture.png")

    pipe = shapes.load_pipeline()
    options = {"num_inference_steps": args.steps, "guidance_scale": 3.0, "arithmetic": "exact"}
    whole = {prompt: doodl_fast.EDICT.from_pipeline(pipe, prompt, **options) for prompt in (args.source, args.target)}
    source, target = (
        doodl_fast.EDICT(chain.denoiser, last_part(chain.schedule, args.strength), arithmetic="exact")
        for chain in (whole[args.source], whole[args.target])
    )
    decoder = whole[args.source].decode

    state = source.state(decoder.encode(pixels), end="image")  # the only rounding
    noise = source.inverse_state(state)
    same = source.forward_state(noise).equals(state)
    print(f"the picture's latents came back bit for bit: {same}")

    edited = decoder(target.forward_state(noise).latents()[0])
    doodl_fast.ImageTensor(edited).save(args.out / "edited.png")
    verdict = shapes.judge(edited[0], args.target)
    print(f"{args.target}: {', '.join(verdict.faults) or 'all is right'}")
    return {"same bits": same, "right": verdict.correct}


def last_part(schedule: doodl_fast.Schedule, strength: float) -> doodl_fast.Schedule:
    """Returns the last steps of a schedule, so that some of the picture stays as it is.

    Args:
        schedule: All steps from noise to picture.
        strength: The part of them that is kept, above 0 and up to 1.
    """
    first = len(schedule.timesteps) - max(1, round(strength * len(schedule.timesteps)))
    return doodl_fast.Schedule(
        schedule.timesteps[first:],
        schedule.alphas_cumprod[first:],
        schedule.alphas_cumprod_prev[first:],
        schedule.prediction_type,
    )


if __name__ == "__main__":
    main()
