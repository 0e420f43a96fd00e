"""The loop that every training stage runs, with a checkpoint from which it continues."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

SECONDS_BETWEEN_CHECKPOINTS = 60


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a stage.

    Attributes:
        steps: The number of optimisation steps.
        batch: The number of examples in a step.
        learning_rate: AdamW's largest learning rate. It rises to this value for 100 steps and then falls as a cosine.
        weight_decay: AdamW's weight decay.
        ema: The decay of the exponential moving average of the weights, or None for no average.
    """

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.01
    ema: float | None = None


RECIPES = {
    "text": Recipe(steps=1500, batch=128, learning_rate=1e-3),
    "vae": Recipe(steps=3200, batch=8, learning_rate=2e-3, weight_decay=0.0, ema=0.99),
    "unet": Recipe(steps=4_500, batch=32, learning_rate=6e-4, ema=0.999),
    "clip": Recipe(steps=4500, batch=64, learning_rate=8e-4, weight_decay=0.05, ema=0.995),
    "classifier": Recipe(steps=1200, batch=64, learning_rate=2e-3, weight_decay=0.05),
}


def batches(indices: np.ndarray, size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Yields shuffled batches of the indices without end, the same ones for the same seed.

    Args:
        indices: The indices of the examples, of shape (N,).
        size: The number of examples in a batch.
        seed: The seed of the order.
        start: The number of batches that are left out at the beginning; they are not computed.
    """
    per_epoch = len(indices) // size
    step = start
    while True:
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(indices)
        for i in range(position, per_epoch):
            yield order[i * size : (i + 1) * size]
            step += 1


def fit(
    name: str,
    work: Path,
    module: nn.Module,
    indices: np.ndarray,
    loss: Callable[[np.ndarray, int], Tensor],
    seed: int = 0,
) -> nn.Module:
    """Trains a module to the end of its stage, from the stage's checkpoint if there is one.

    Args:
        name: The stage, a key of `RECIPES`.
        work: The folder of the checkpoints.
        module: The module to train, in place.
        indices: The indices of the training examples, of shape (N,).
        loss: A function of the indices of a batch and of the step that returns a 0-dim loss.
        seed: The seed of the batches' order and of the random numbers in the loss.

    Returns:
        The module with the exponential moving average of the weights, in eval mode, without gradients.
    """
    recipe, path = RECIPES[name], work / f"{name}.ckpt"
    optimizer = torch.optim.AdamW(
        module.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
    )
    average = copy.deepcopy(module)
    step, recent = 0, math.nan
    if path.exists():
        stored = torch.load(path, weights_only=True)
        module.load_state_dict(stored["module"])
        average.load_state_dict(stored["average"])
        optimizer.load_state_dict(stored["optimizer"])
        step, recent = stored["step"], stored["loss"]

    def save() -> None:
        state = {"module": module.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "step": step, "loss": recent}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    module.train()
    saved = time.monotonic()
    with tqdm(total=recipe.steps, initial=step, desc=name, mininterval=5) as bar:
        for chosen in batches(indices, recipe.batch, seed, step):
            if step >= recipe.steps:
                break
            torch.manual_seed(seed * 1_000_003 + step)
            warm, done = min(1.0, (step + 1) / 100), step / recipe.steps
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            value = loss(chosen, step)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            decay = min(recipe.ema or 0.0, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, live in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
                    mean.lerp_(live, 1 - decay) if mean.is_floating_point() else mean.copy_(live)
            found = float(value.detach())
            recent = found if math.isnan(recent) else 0.98 * recent + 0.02 * found
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                save()
                saved = time.monotonic()
    save()
    return average.eval().requires_grad_(False)
