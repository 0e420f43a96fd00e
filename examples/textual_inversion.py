"""Learns a word for a thing that captions do not name, by a gradient through the whole chain (textual inversion).

    python examples/textual_inversion.py

Captions of the embedded pipeline say "star", and never how many points it has. One row of the text encoder's table of
words is the variable: it starts as the word "star", and learns to stand for a star of six points, whom a classifier
recognises. Every step draws colours and noise that no step before had. Whether the word has learnt it is said by a
measure without networks, on colours that training leaves out and from noise that it never drew. Textual inversion (Gal
et al., arXiv 2208.01618) does so from pictures, by one call of the network at a time; here a loss on finished pictures
is enough.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import doodl_fast
from doodl_fast import guidance, shapes
from doodl_fast.shapes.scenes import COLOURS

HELD_OUT = ("green", "black")
WORD = "star"


class Words:
    """The conditions of prompts in which one word has a vector of our own.

    Args:
        pipe: The pipeline, whose tokenizer and text encoder are used and not changed.
        word: The word, which is one token.
    """

    def __init__(self, pipe: Any, word: str) -> None:
        self.pipe, self.encoder = pipe, pipe.text_encoder.requires_grad_(False)
        (self.token,) = pipe.tokenizer(word, add_special_tokens=False).input_ids
        table = self.encoder.get_input_embeddings().weight
        self.name = next(name for name, weight in self.encoder.named_parameters() if weight is table)
        self.table, self.first = table, table[self.token].clone()

    def __call__(self, prompts: list[str], vector: Tensor) -> Tensor:
        """Returns the conditions (B, length, D) of prompts, with a graph to the vector (D,)."""
        options = {"padding": "max_length", "max_length": self.pipe.tokenizer.model_max_length}
        ids = self.pipe.tokenizer(prompts, return_tensors="pt", **options).input_ids
        table = self.table.index_put((torch.tensor([self.token]),), vector[None])
        found: Tensor = torch.func.functional_call(self.encoder, {self.name: table}, (ids,))[0]
        return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example. Returns the losses of all steps, the vector, and which held-out pictures are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variety", default="6-pointed star", choices=[v for v in shapes.VARIETY_NAMES if WORD in v])
    parser.add_argument("--steps", type=int, default=6, help="of the sampler")
    parser.add_argument("--training-steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="pictures for each step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--held-out", type=int, default=40, help="pictures that judge the word before and after")
    parser.add_argument("--out", type=Path, default=Path("examples/out/textual_inversion"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    pipe = shapes.load_pipeline()
    words = Words(pipe, WORD)
    nothing = words([""], words.first)
    loss = guidance.Classifier(*shapes.load_classifier(), args.variety)
    vector = words.first.clone().requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=args.learning_rate)
    seen = [colour for colour in COLOURS if colour not in HELD_OUT]

    def chain(prompts: list[str], vector: Tensor) -> doodl_fast.DDIM:
        conditions = {
            "prompt_embeds": words(prompts, vector),
            "negative_prompt_embeds": nothing.expand(len(prompts), -1, -1),
        }
        return doodl_fast.DDIM.from_pipeline(pipe, num_inference_steps=args.steps, guidance_scale=4.0, **conditions)

    def judged(vector: Tensor, name: str) -> np.ndarray:
        """Which of the pictures of held-out colours show the variety, and nothing else that is wrong."""
        right = []
        for seed, colour in enumerate(HELD_OUT):
            prompts = [f"a {colour} {WORD}"] * (args.held_out // len(HELD_OUT))
            with torch.no_grad():
                sampler = chain(prompts, vector)
                images = sampler.decode(sampler(sampler.noise(seed=10**6 + seed, batch=len(prompts)))[0])
            doodl_fast.ImageTensor(images).save(args.out / f"{name}_{colour}.png")
            right += [shapes.judge(image, prompts[0], variety=args.variety).correct for image in images]
        return np.array(right)

    before = judged(vector.detach(), "before")
    losses, draw = [], random.Random(0)
    for step in range(args.training_steps):
        sampler = chain([f"a {draw.choice(seen)} {WORD}" for _ in range(args.batch)], vector)
        value = loss(sampler.decode(sampler(sampler.noise(seed=step, batch=args.batch))[0]))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
        print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    after = judged(vector.detach(), "after")
    print(f"pictures of {' and '.join(HELD_OUT)} stars that show a {args.variety}, of {len(before)}:", end=" ")
    print(f"{before.sum()} before, {after.sum()} after")
    return {"losses": losses, "vector": vector.detach(), "first": words.first, "before": before, "after": after}


if __name__ == "__main__":
    main()
