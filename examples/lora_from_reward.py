"""Trains a LoRA on a reward through the whole chain, as DRaFT and AlignProp do (arXiv 2309.17400, 2310.03739).

    python examples/lora_from_reward.py
    accelerate launch --num_processes 2 examples/lora_from_reward.py                    # on two GPUs
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/lora_from_reward.py    # in two processes on the CPU

Four sampling steps are too few for the embedded pipeline: fewer than half of its pictures of two objects are right. The
LoRA learns to do with four. The reward is the score of the embedded CLIP for the caption; every step draws captions and
noise that no step before had. Whether pictures got better is said by a measure that has no network, on captions that
training leaves out, and from noise that it never drew. A run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import doodl_fast
from doodl_fast import shapes
from doodl_fast.guidance.text_score import TextScore
from doodl_fast.shapes.evaluate import verdicts
from doodl_fast.shapes.scenes import prompts

try:
    from accelerate import Accelerator
except ImportError:  # One process does without it.
    Accelerator = None


class LowRank(nn.Module):
    """Adds the product of two thin matrices to a weight. It is zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]).to(weight) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_lora(network: nn.Module, rank: int) -> dict[str, nn.Parameter]:
    """Adds a LoRA to the projections of attention, and returns its weights by name. No other weight requires grad."""
    network.requires_grad_(False)
    for name, layer in list(network.named_modules()):
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
            layer.parametrizations.weight.original.requires_grad_(False)
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def save(out: Path, step: int, lora: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    """Writes the LoRA and the state of its optimiser; the old file stays until the new one is whole."""
    state = optimiser.state_dict()["state"]
    tensors = {f"weight/{name}": weight.detach().clone() for name, weight in lora.items()}
    tensors |= {f"state/{i}/{key}": value.clone() for i, entry in state.items() for key, value in entry.items()}
    save_file(tensors, out / "new.safetensors", {"step": str(step)})
    (out / "new.safetensors").replace(out / f"lora-{step:05d}.safetensors")


def resume(out: Path, lora: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    """Reads the latest file that `save` wrote, and returns the number of steps that were done."""
    files = sorted(out.glob("lora-*.safetensors"))
    if not files:
        return 0
    tensors = load_file(files[-1])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("state/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    with torch.no_grad():
        for name, weight in lora.items():
            weight.copy_(tensors[f"weight/{name}"])
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return int(files[-1].stem.removeprefix("lora-"))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example. Returns the rewards of all steps, the LoRA, and which held-out pictures are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of the sampler")
    parser.add_argument("--training-steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="pictures for each step and process")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--last", type=int, help="the gradient goes through the last K steps alone")
    parser.add_argument("--random-last", action="store_true", help="through a random number of them, from 1 to K")
    parser.add_argument("--held-out", type=int, default=100, help="the number of captions that are measured")
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("examples/out/lora_from_reward"))
    args = parser.parse_args(argv)
    if args.random_last and args.last is None:
        parser.error("--random-last: expected --last K as well, which is the most steps that are drawn")
    args.out.mkdir(parents=True, exist_ok=True)

    accelerator = Accelerator() if Accelerator is not None else None
    rank, count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = accelerator.device if accelerator else "cpu"
    pipe, (clip, processor) = shapes.load_pipeline(device), shapes.load_clip(device)
    seen, unseen = list(prompts(2, held_out=False)), random.Random(0).sample(list(prompts(2, True)), args.held_out)
    before = np.array([v.correct for v in verdicts(pipe, unseen, num_inference_steps=args.steps, seed=1)])
    torch.manual_seed(0)  # The LoRA begins with the same values in all processes.
    lora = add_lora(pipe.unet, args.rank)
    optimiser = torch.optim.Adam(lora.values(), lr=args.learning_rate)
    rewards: list[float] = []
    for step in range(resume(args.out, lora, optimiser), args.training_steps):
        # What is drawn depends on the step and the process alone, so a run that goes on draws what it would have drawn.
        draw = 1000 + step * count + rank
        texts = [str(prompt) for prompt in random.Random(draw).sample(seen, args.batch)]
        chain = doodl_fast.DDIM.from_pipeline(pipe, texts, None, args.steps, 4.0, trainable=list(lora.values()))
        if args.last is not None:
            least = 1 if args.random_last else args.last
            chain.last_steps = doodl_fast.LastSteps(least, args.last, seed=step)
        images = chain.decode(chain(chain.noise(seed=draw))[0])
        loss = TextScore(clip, processor, texts)(images)
        optimiser.zero_grad()
        loss.backward()
        for weight in lora.values() if count > 1 else ():
            weight.grad = accelerator.reduce(weight.grad, "mean")
        nn.utils.clip_grad_norm_(lora.values(), 1.0)
        optimiser.step()
        rewards.append(-loss.item())
        if rank == 0:
            print(f"step {step}: reward {rewards[-1]:.3f}")
            if (step + 1) % args.save_every == 0 or step + 1 == args.training_steps:
                save(args.out, step + 1, lora, optimiser)
    after = np.array([v.correct for v in verdicts(pipe, unseen, num_inference_steps=args.steps, seed=1)])
    if rank == 0:
        print(f"right of {len(unseen)} pictures of held-out captions: {before.sum()} before, {after.sum()} after")
        change = after * 1.0 - before  # Of each picture: the noise is the same before and after.
        low, high = change.mean() + np.array([-1.96, 1.96]) * change.std() / len(unseen) ** 0.5
        print(f"the share that is right changed by {change.mean():+.2f}; 95% interval {low:+.2f} to {high:+.2f}")
    return {"rewards": rewards, "before": before, "after": after, "lora": lora}


if __name__ == "__main__":
    main()
