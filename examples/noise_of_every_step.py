"""Optimises the noise of every step of a stochastic sampler for a reward, as DNO does (arXiv 2405.18881).

    python examples/noise_of_every_step.py

The reward here is redness. The loop is plain PyTorch, because a chain is a node of its graph like any other function.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import doodl_fast
from doodl_fast import shapes


def redness(images: Tensor) -> Tensor:
    """Returns how red pictures (B, 3, H, W) are: the mean of red, less that of the other two channels."""
    return images[:, 0].mean() - images[:, 1:].mean()


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Runs the example. Returns the rewards of all steps, with the noise of the start alone and with all noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a purple star")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--optimization-steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=Path("examples/out/noise_of_every_step"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    chain = doodl_fast.Sampler.from_pipeline(
        shapes.load_pipeline(), args.prompt, num_inference_steps=args.steps, guidance_scale=4.0, eta=1.0
    )
    rewards: dict[str, list[float]] = {}
    for name in ("start", "every step"):
        start = chain.noise(seed=0).requires_grad_()
        steps = chain.draw_noise(start.detach(), seed=1)
        variables = [start]
        if name == "every step":
            variables += [noise.requires_grad_() for noise in steps]
        optimiser = torch.optim.Adam(variables, lr=args.learning_rate)
        rewards[name] = []
        for _ in range(args.optimization_steps):
            images = chain.decode(chain(start, noise=steps)[0])
            reward = redness(images)
            rewards[name].append(float(reward.detach()))
            optimiser.zero_grad()
            (-reward).backward()
            optimiser.step()
        doodl_fast.ImageTensor(images.detach()).save(args.out / f"{name.replace(' ', '_')}.png")
        print(f"noise of {name}: reward {rewards[name][0]:.4f} at first, {rewards[name][-1]:.4f} at last")
    return rewards


if __name__ == "__main__":
    main()
