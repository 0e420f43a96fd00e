"""Measures how good the embedded models are: ``python -m doodl_fast.shapes.evaluate``.

It prints the share of pictures in which everything is right, by the measure without networks, for prompts of one object
and of two objects, both those that training saw and those that it left out, and what is wrong with the other pictures.
It also prints the accuracy of the classifier on new renderings, and how often CLIP prefers the right caption to one
that differs from it in a single respect.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import load_classifier, load_clip, load_pipeline
from .captions import confusions
from .measure import Verdict, judge
from .scenes import VARIETY_NAMES, Prompt, pixels, prompts, render, sample

GUIDANCE_SCALE = 4.0
BATCH = 25


@torch.no_grad()
def generate(
    pipeline: Any,
    texts: Sequence[str],
    num_inference_steps: int = 20,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
) -> Tensor:
    """Makes one picture for each prompt by calling the diffusers pipeline.

    Args:
        pipeline: The pipeline.
        texts: The prompts.
        num_inference_steps: The number of sampling steps.
        guidance_scale: The scale of classifier-free guidance.
        seed: The seed of the noise.

    Returns:
        The pictures, of shape (N, 3, 64, 64), in [-1, 1].
    """
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for i in range(0, len(texts), BATCH):
        output = pipeline(
            list(texts[i : i + BATCH]),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="pt",
        )
        parts.append(output.images * 2 - 1)
    return torch.cat(parts)


def verdicts(pipeline: Any, wanted: Sequence[Prompt], **options: Any) -> list[Verdict]:
    """Makes one picture for each prompt, and returns the measure's verdicts. The options are those of `generate`."""
    images = generate(pipeline, [str(prompt) for prompt in wanted], **options)
    return [judge(image, prompt) for image, prompt in zip(images, wanted, strict=True)]


def share_right(pipeline: Any, wanted: Sequence[Prompt], **options: Any) -> float:
    """Returns the share of prompts in whose pictures everything is right. The options are those of `generate`."""
    return float(np.mean([verdict.correct for verdict in verdicts(pipeline, wanted, **options)]))


@torch.no_grad()
def classifier_accuracy(count: int = 300, seed: int = 12345) -> float:
    """Returns the share of new renderings of one object whose variety the classifier recognises."""
    model, _ = load_classifier()
    rng = np.random.default_rng(seed)
    scenes = [sample(rng, num_objects=1) for _ in range(count)]
    logits = model(pixels(np.stack([render(s) for s in scenes]))).logits
    truth = torch.tensor([VARIETY_NAMES.index(s.objects[0].variety) for s in scenes])
    return float((logits.argmax(-1) == truth).float().mean())


@torch.no_grad()
def clip_preferences(count: int = 150, seed: int = 54321) -> dict[str, float]:
    """Returns, for each kind of change, how often CLIP prefers a picture's own caption to the changed one."""
    from ..guidance import ClipText

    model, processor = load_clip()
    rng = np.random.default_rng(seed)
    scenes = [sample(rng, num_objects=2, held_out=True) for _ in range(count)]
    images = pixels(np.stack([render(s) for s in scenes]))
    embedded = ClipText(model, processor, "a red star").embed((images + 1) / 2)
    names = (
        "first colour",
        "first shape",
        "second colour",
        "second shape",
        "objects swapped",
        "colours swapped",
        "relation",
    )
    wins = defaultdict(list)
    for scene, image in zip(scenes, embedded, strict=True):
        texts = [str(scene.prompt), *confusions(rng, str(scene.prompt), unchanged=True)[: len(names)]]
        tokens = processor.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        features = model.get_text_features(input_ids=tokens)
        features = getattr(features, "pooler_output", features)
        similarity = torch.nn.functional.cosine_similarity(features, image[None])
        for name, text, value in zip(names, texts[1:], similarity[1:].tolist(), strict=True):
            if text != texts[0]:
                wins[name].append(similarity[0].item() > value)
    return {name: float(np.mean(won)) for name, won in wins.items()}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind with two objects")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    args = parser.parse_args()
    pipeline = load_pipeline()
    rng = random.Random(0)
    kinds = {
        "one object": list(prompts(1)) * 3,
        "two objects": rng.sample(list(prompts(2)), args.count),
        "two objects, seen in training": rng.sample(list(prompts(2, held_out=False)), args.count),
        "two objects, held out": rng.sample(list(prompts(2, held_out=True)), args.count),
    }
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    for name, wanted in tqdm(kinds.items()):
        found = verdicts(pipeline, wanted, **options)
        faults = Counter(" and ".join(verdict.faults) for verdict in found if not verdict.correct)
        wrong = ", ".join(f"{fault} {count}" for fault, count in faults.most_common())
        share = float(np.mean([verdict.correct for verdict in found]))
        tqdm.write(f"{name:32} {share:6.1%} right of {len(wanted)}; wrong: {wrong or 'none'}")
    print(f"{'classifier, fresh renderings':32} {classifier_accuracy():6.1%}")
    for name, value in clip_preferences().items():
        print(f"{'CLIP: ' + name:32} {value:6.1%}")


if __name__ == "__main__":
    main()
