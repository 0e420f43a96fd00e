"""Learns a word for a thing that captions do not name, by a gradient through the whole chain (textual inversion).

    python examples/textual_inversion.py

Captions of the embedded pipeline say "star", and never how many points it has. One row of the text encoder's table of
words is the variable: it starts as the word "star", and learns to stand for a star of six points, whom a classifier
recognises. Every step draws colours and noise that no step before had. Textual inversion (Gal et al., arXiv 2208.01618)
does so from pictures, by one call of the network at a time; here a loss on finished pictures is enough.

Three things keep the word from being lost. The gradient of each picture is scaled to length one before the mean, since
those of single pictures differ by a factor of a hundred, and the longest would decide alone. The classifier does not
mind colours, nor a second star, so the score of a CLIP for the caption is part of the loss. And pictures from noise
that is not trained on, judged by a measure without networks, say which word is kept; "star" itself is among them. What
has been learnt is then told for colours that neither training nor this choice has seen, from noise of its own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import doodl_fast
from doodl_fast import guidance, shapes
from doodl_fast.guidance.text_score import TextScore
from doodl_fast.shapes.scenes import COLOURS

HELD_OUT = ("green", "black")
SEEN = [colour for colour in COLOURS if colour not in HELD_OUT]
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

    def __call__(self, prompts: list[str], vectors: Tensor) -> Tensor:
        """Returns the conditions (B, length, D) of prompts, with a graph to the vectors (B, D), one for each prompt."""
        options = {"padding": "max_length", "max_length": self.pipe.tokenizer.model_max_length}
        ids = self.pipe.tokenizer(prompts, return_tensors="pt", **options).input_ids
        rows = len(self.table) + torch.arange(len(prompts))[:, None]  # The vectors follow the table's own rows.
        table, ids = torch.cat([self.table, vectors]), torch.where(ids == self.token, rows, ids)
        found: Tensor = torch.func.functional_call(self.encoder, {self.name: table}, (ids,))[0]
        return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variety", default="6-pointed star", choices=[v for v in shapes.VARIETY_NAMES if WORD in v])
    parser.add_argument("--steps", type=int, default=6, help="of the sampler")
    parser.add_argument("--training-steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=12, help="pictures for each step")
    parser.add_argument("--learning-rate", type=float, default=0.04)
    parser.add_argument("--caption-weight", type=float, default=0.3, help="of the score of CLIP for the caption")
    parser.add_argument("--validate-every", type=int, default=5, help="training steps")
    parser.add_argument("--held-out", type=int, default=40, help="pictures that judge a word, 4 or more")
    parser.add_argument("--seed", type=int, default=0, help="of the colours and the noise of training")
    parser.add_argument("--out", type=Path, default=Path("examples/out/textual_inversion"))
    args = parser.parse_args(argv)
    if args.held_out < len(SEEN):
        parser.error(f"--held-out: expected at least {len(SEEN)}, one for each colour of training, got {args.held_out}")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example. Returns the losses of all steps, the vector, and which pictures are right."""
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    pipe, clip = shapes.load_pipeline(), shapes.load_clip()
    words = Words(pipe, WORD)
    nothing = words([""], words.first[None])
    classifier = guidance.Classifier(*shapes.load_classifier(), args.variety)
    vector = words.first.clone().requires_grad_()
    optimiser = torch.optim.SGD([vector], lr=args.learning_rate)

    def pictures(prompts: list[str], vectors: Tensor, seed: int) -> Tensor:
        conditions = {
            "prompt_embeds": words(prompts, vectors),
            "negative_prompt_embeds": nothing.expand(len(prompts), -1, -1),
        }
        options: dict[str, Any] = {"num_inference_steps": args.steps, "guidance_scale": 4.0, **conditions}
        chain = doodl_fast.DDIM.from_pipeline(pipe, **options)
        return chain.decode(chain(chain.noise(seed=seed, batch=len(prompts)))[0])

    @torch.no_grad()
    def judged(vector: Tensor, colours: Sequence[str], seed: int, name: str | None = None) -> np.ndarray:
        """Which pictures of some colours show the variety, and nothing else that is wrong."""
        right = []
        for place, colour in enumerate(colours):
            prompts = [f"a {colour} {WORD}"] * (args.held_out // len(colours))
            images = pictures(prompts, vector.expand(len(prompts), -1), seed + place)
            if name is not None:
                doodl_fast.ImageTensor(images).save(args.out / f"{name}_{colour}.png")
            right += [shapes.judge(image, prompts[0], variety=args.variety).correct for image in images]
        return np.array(right)

    best, kept, kept_step = judged(words.first, SEEN, 10**7).sum(), words.first, 0
    first, losses, draw = best, [], random.Random(args.seed)
    for step in range(1, args.training_steps + 1):
        prompts = [f"a {draw.choice(SEEN)} {WORD}" for _ in range(args.batch)]
        vectors = vector.detach().repeat(args.batch, 1).requires_grad_()  # A copy for each picture's own gradient.
        images = pictures(prompts, vectors, draw.randrange(10**6))
        value = classifier(images) + args.caption_weight * TextScore(*clip, prompts)(images)
        (gradients,) = torch.autograd.grad(value, vectors)
        vector.grad = torch.nn.functional.normalize(gradients, dim=1).mean(0)
        optimiser.step()
        losses.append(value.item())
        lengths = gradients.norm(dim=1)
        print(f"step {step}: loss {losses[-1]:.3f}; of pictures' gradients, the longest is", end=" ")
        print(f"{lengths.max() / lengths.min():.0f} times the shortest", flush=True)
        if step % args.validate_every == 0 or step == args.training_steps:
            right = judged(vector.detach(), SEEN, 10**7).sum()
            print(f"step {step}: {right} pictures of {args.held_out} for validation are right", flush=True)
            if right >= best:  # Of equals the later, which has learnt more.
                best, kept, kept_step = right, vector.detach().clone(), step
    before, after = (judged(v, HELD_OUT, 10**6, name) for v, name in ((words.first, "before"), (kept, "after")))
    print(f"the word of step {kept_step} is kept; pictures for validation: {first} right before, {best} after")
    print(f"pictures of {' and '.join(HELD_OUT)} stars that show a {args.variety}, of {len(before)}:", end=" ")
    print(f"{before.sum()} before, {after.sum()} after")
    found = {"losses": losses, "vector": kept, "last": vector.detach(), "first": words.first}
    return {**found, "validated": (first, best), "before": before, "after": after}


if __name__ == "__main__":
    main()
