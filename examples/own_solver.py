"""A solver of your own: Adams and Bashforth's two-step method, written as couplings.

    python examples/own_solver.py

It remembers the network's last output, so that one call a step gives second order. DDIM is of first order. The error is
measured against DDIM with many steps, and the gradient against plain autograd.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor

import doodl_fast
from doodl_fast import Coupling, Denoiser, DiffusionChain, Program, Schedule, shapes

PICTURE, EVEN, ODD = 0, 1, 2  # the latents of the program: the picture, and the outputs of even and odd steps


def adams_bashforth(schedule: Schedule) -> Program:
    """Returns the couplings of the method, for a network that predicts noise.

    With z = x / sqrt(alpha) and s = sqrt((1 - alpha) / alpha) the sampler's equation is dz/ds = noise(x). A step of
    length h after one of length g adds h ((1 + h / 2g) noise - h / 2g last noise) to z. The first step is Euler's.
    """
    levels = [*schedule.alphas_cumprod, schedule.alphas_cumprod_prev[-1]]
    lengths = [((1 - b) / b) ** 0.5 - ((1 - a) / a) ** 0.5 for a, b in itertools.pairwise(levels)]
    couplings = []
    for step, t in enumerate(schedule.timesteps):
        new, last = (EVEN, ODD) if step % 2 == 0 else (ODD, EVEN)
        h, end = lengths[step], levels[step + 1] ** 0.5
        share = h / (2 * lengths[step - 1]) if step else 0.0
        scale = end / levels[step] ** 0.5
        couplings.append(Coupling(new, a=0.0, b=1.0, step=step, tag=t, source=PICTURE))  # new <- noise(picture)
        couplings.append(Coupling(PICTURE, a=scale, c=end * h * (1 + share), step=step, source=new))
        couplings.append(Coupling(PICTURE, a=1.0, c=-end * h * share, step=step, source=last))
    return tuple(couplings)


class AdamsBashforth(DiffusionChain):
    """The sampler of `adams_bashforth`. It starts from one latent and has no inverse, as outputs are forgotten."""

    num_starts = 1
    num_pictures = 1

    def __init__(self, denoiser: Denoiser, schedule: Schedule, **options: Any) -> None:
        super().__init__(denoiser, schedule, adams_bashforth, **options)

    def __call__(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        """Samples from noise x (B, C, ...). Returns a tuple of one, the picture's latents."""
        return (self.run(x, torch.zeros_like(x), torch.zeros_like(x))[PICTURE],)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the example. Returns the errors of both solvers, and that of the gradient."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--fine-steps", type=int, default=150, help="of DDIM, whose picture counts as the solution")
    args = parser.parse_args(argv)

    pipe = shapes.load_pipeline()
    prompt = "a red star left of a blue circle"

    def chain(kind: type[DiffusionChain], steps: int, memory: str = "checkpoint") -> Any:
        return kind.from_pipeline(pipe, prompt, num_inference_steps=steps, guidance_scale=1.0, memory=memory)

    noise = chain(AdamsBashforth, args.steps).noise(seed=0)
    with torch.no_grad():
        (truth,) = chain(doodl_fast.DDIM, args.fine_steps)(noise)
        found = {}
        for kind in (doodl_fast.DDIM, AdamsBashforth):
            (latents,) = chain(kind, args.steps)(noise)
            found[kind.__name__] = float((latents - truth).norm() / truth.norm())
            print(f"{kind.__name__}, {args.steps} steps: relative error {found[kind.__name__]:.4f}")

    gradients = []
    for memory in ("checkpoint", "naive"):
        start = noise.clone().requires_grad_()
        chain(AdamsBashforth, min(args.steps, 6), memory)(start)[0].square().mean().backward()
        gradients.append(start.grad)
    found["gradient"] = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    print(f"the gradient is plain autograd's to {found['gradient']:.1e}")
    return found


if __name__ == "__main__":
    main()
