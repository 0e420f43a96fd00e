"""The optimisation loop of DOODL (Wallace et al., ICCV 2023, arXiv 2303.13703)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..chain.host_reads import together
from . import checkpoint
from .arguments import (
    as_pair,
    check_functions,
    check_randomness,
    check_steps,
    check_stopping,
    renamed_arguments,
)
from .assembly import new_objective, new_update, plain_settings
from .binding import BoundChain
from .evaluation import Evaluation
from .fingerprint import fingerprint
from .folder_lock import FolderLock
from .losses import Losses
from .objective import Decode, Objective, undecoded
from .optimizers import OptimizerFactory, SchedulerFactory
from .progress import Progress
from .result import Pair, Result, StepInfo
from .run_folder import check_home, hash_of, home_of
from .searching import start_from_best
from .update import UpdateSettings
from .variables import START, VariableOptions, parse

__all__ = ["Result", "StepInfo", "descend", "optimize"]

Callback = Callable[[StepInfo], bool | None]


@renamed_arguments(learning_rate="grad_scale", callback="callback_on_step_end")
def optimize(
    chain: Callable[..., Pair],
    latents: Tensor | Pair,
    decode: Decode | None,
    loss: Any,
    num_optimization_steps: int = 50,
    *,
    variables: Any = None,
    grad_scale: float = 1.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    clip_grad_value: float | None = 1e-3,
    tied_latents: bool = True,
    renormalize_latents: bool = True,
    perturbation_scale: float = 1e-4,
    first_image_only: bool = False,
    optimizer: OptimizerFactory | torch.optim.Optimizer | None = None,
    scheduler: SchedulerFactory | None = None,
    per_sample: bool = False,
    patience: int | None = None,
    min_delta: float = 0.0,
    best_of: int = 1,
    seed: int = 0,
    generator: torch.Generator | None = None,
    callback_on_step_end: Callback | None = None,
    progress: bool = True,
    folder: str | Path | None = None,
    resume: bool | str | Path = False,
) -> Result:
    """Optimises noise latents so that the images that a diffusion chain makes of them have a low loss.

    This is DOODL (Wallace et al., ICCV 2023, arXiv 2303.13703): every step runs the whole chain, decodes both final
    latents, differentiates the loss back to the noise latents and updates these by clipped momentum SGD.

    Args:
        chain: ``x0, y0 = chain(x, y)``, differentiable, for instance a `doodl_fast.EDICT`; or a solver that starts from
            one latent, such as `doodl_fast.DDIM`. Then its one picture is scored, and the noise moves as a pair of
            equal latents would. If the chain has memory="auto", its budget is for the whole gradient: decoder and loss
            are measured once beforehand, and where their ``leaner()`` offers a version that needs less memory, that
            version may replace them, also when memory runs out later (torch.OutOfMemoryError). `doodl_fast.Decoder` and
            the CLIP guides have that method.
        latents: Noise, (B, C, ...) floating point. One tensor starts x and y equal; a pair gives (x, y).
        decode: Final latents (B, C, ...) -> images, differentiable. A `doodl_fast.Decoder` gets the final latents in
            float32 or float64 and casts to the dtype of its VAE; any other function gets them in the dtype of
            `latents`. The cotangents on the way back are float32 or better in both cases, behind a decoder that gets
            float16 by loss scaling. None: the loss gets the final latents themselves.
        loss: Images -> differentiable scalar. The images of x0 are decoded, scored and differentiated before those of
            y0, so that one decoder graph is alive at a time. A loss is also given what its parameters name: `latents`,
            the final latents; `start`, the starting ones; `noise`, that of the steps; `prompts`, the chain's texts; and
            every other variable by its name. All of these carry gradients but the prompts. Other tensors that require
            grad and that the loss depends on are named in a warning. Several losses are a list or a dict of functions
            and of pairs (function, weight); the result's `history` has the values of each by its name.
        num_optimization_steps: Number of updates.
        variables: What is optimised, a list of names or a dict of names and options like torch's groups of parameters:
            ``{"start": {}, "noise": {"lr": 0.1}}``. "start" is the starting latents, which alone are optimised by
            default. Others are "noise", that of all steps (chains with `num_draws`); "prompt_embeds",
            "negative_prompt_embeds", "guidance_scale", "weights" (those that the chain's `trainable` names; the network
            keeps its own, and `Result.state_dict` has the new ones) and any other argument of the network that holds
            tensors, such as "controlnet_cond". Options are those of the optimizer (``lr``, ...), `optimizer`,
            `scheduler`, `grad_scale`, `clip_grad_value`, `renormalize` (whether every sample keeps its norm), `value`
            (where it starts) and `project` (a function that is called with each tensor after every update, and returns
            what takes its place, such as `doodl_fast.guidance.white_projection`). Variables besides the start get the
            gradient of the mean loss, are not clipped, and are changed by Adam unless an optimizer is given.
        grad_scale: Multiplies the gradient before it is clipped. With clipping and momentum SGD it decides which
            entries of the gradient are clipped; it is no step size. The reference code calls it by this name too.
        momentum: Momentum of SGD, in [0, 1).
        nesterov: Whether the momentum is Nesterov's.
        clip_grad_value: Largest magnitude of an entry of the scaled gradient; None for no limit.
        tied_latents: Whether x and y take the mean of their gradients and stay equal.
        renormalize_latents: Whether each latent is scaled back, after every update, to the norm that it started with.
        perturbation_scale: Standard deviation of the noise that is added to both latents at every update.
        first_image_only: Whether only x0 is decoded and scored.
        optimizer: A factory of a ``torch.optim.Optimizer`` that replaces momentum SGD, for instance
            ``lambda p: torch.optim.Adam(p, lr=1e-2)``; or an optimizer, whose class and options are taken. Each
            variable gets one of its own. One that evaluates the loss several times, LBFGS, gets the mean loss and
            its gradient, neither scaled nor clipped.
        scheduler: A factory of a schedule of ``torch.optim.lr_scheduler``, for instance
            ``lambda o: CosineAnnealingLR(o, 50)``. Its state is stored and resumed.
        per_sample: Whether each sample of the batch is an optimisation of its own, with the results of B single runs
            (`Result.samples`). Each loss is called once for each sample, with that sample's images (1, 3, H, W) and
            parts of what it names; `sample` is the sample's number. `Each` has one loss for each sample. A sample that
            has ended keeps its values while the others go on.
        patience: The run, or a sample, ends when so many steps have brought no better loss. None for never.
        min_delta: By how much a loss must be lower to count as better for `patience`.
        best_of: With N > 1, N - 1 more starts are drawn, each with the norm of `latents`, and the one with the lowest
            loss is optimised; with `per_sample` each sample's own. See `search`.
        seed: Seed of the perturbation.
        generator: A generator for the perturbation, in place of the seed.
        callback_on_step_end: Called with a `StepInfo` once the loss and the gradient of a step are known and before
            the update. If it returns True the run ends there, without the update: the result, and the state that is
            stored, are those of the latents that it saw.
        progress: Whether to show a progress bar.
        folder: Where the state is stored after every step. It is replaced as a whole, so that it survives a kill at
            any time. One process at a time may use a folder.
        resume: Whether to continue the run in `folder`; or the folder itself. The results are bit-identical to those
            of a run that was never interrupted, also for losses that draw from PyTorch's global random state, which is
            stored and restored.

    Returns:
        The final latents, the best ones, the images of both, and all losses. The latents are float32 or float64.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument cannot work, or the folder holds another run.
        FloatingPointError: A loss, a gradient or an update is not finite. The state of the step before stays stored.

    Example:
        >>> result = doodl_fast.optimize(chain, noise, decoder, loss, 30, grad_scale=30.0, folder="run")
    """
    check_functions(chain, decode, loss, callback_on_step_end)
    check_steps(num_optimization_steps)
    check_randomness(seed, generator)
    check_stopping(patience, min_delta, best_of)
    decode, losses, chosen = decode or undecoded, Losses.of(loss), parse(variables)
    start = chosen.get(START, VariableOptions())
    settings = UpdateSettings(
        start.grad_scale or grad_scale,
        momentum,
        nesterov,
        start.clip_grad_value or clip_grad_value,
        tied_latents,
        renormalize_latents if start.renormalize is None else start.renormalize,
        perturbation_scale,
    )
    x, y = as_pair(latents)
    # A generator of the caller's own may be in any state, so only a seed can be compared.
    noise_seed = seed if generator is None else None
    generator = generator or torch.Generator().manual_seed(seed)
    bound = BoundChain(chain, chosen, x, per_sample, seed)
    update = new_update((x, y), settings, generator, chosen, bound.initial, optimizer, scheduler, per_sample)
    home = home_of(folder, resume)
    check_home(home, resume)
    with contextlib.nullcontext() if home is None else FolderLock(home):
        check_home(home, resume)  # again, as another process may have used the folder in between
        functions = None if home is None else fingerprint(chain, decode, losses)
        objective = new_objective(bound, decode, losses, x.dtype, update, first_image_only, per_sample)
        plain = {**settings.as_dict(), "first_image_only": first_image_only, "seed": noise_seed, "start": hash_of(x, y)}
        plain |= plain_settings(chosen, bound.initial, per_sample, patience, min_delta, best_of)
        run = Progress(update, plain, functions, per_sample, patience, min_delta)
        if resume and home is not None:
            run.load(home)
        elif best_of > 1:
            start_from_best(run, objective, best_of, seed)
        result = descend(run, objective, num_optimization_steps, callback_on_step_end, progress, home)
    return dataclasses.replace(result, weight_names=bound.weight_names) if bound.weight_names else result


def descend(
    run: Progress,
    objective: Objective,
    num_optimization_steps: int,
    callback: Callback | None = None,
    progress: bool = True,
    home: Path | None = None,
) -> Result:
    """Runs the loop of `optimize` from wherever `run` stands.

    Args:
        run: The progress so far; it is changed.
        objective: The function that is minimised.
        num_optimization_steps: The step at which the loop ends.
        callback: See `optimize`.
        progress: Whether to show a progress bar.
        home: The folder where the progress is stored after every step, if any.
    """
    before_first_step = run.tree() if home is not None and run.step == 0 else None
    bar = tqdm(total=num_optimization_steps, initial=min(run.step, num_optimization_steps), disable=not progress)
    with bar, together() as reads:
        while run.step < num_optimization_steps:
            found = objective.evaluate(run.update.latents, run.step, run.update.values())
            is_last = run.record(found)
            bar.set_postfix(loss=f"{run.losses[-1]:.4g}")
            info = StepInfo(
                run.step,
                run.losses[-1],
                (run.update.latents[0], run.update.latents[1]),
                found.images,
                found.terms,
                tuple(found.sample_means()),
                run.update.values(),
            )
            if (callback is not None and callback(info)) or is_last:
                # The folder already holds these values, unless no step has been stored yet.
                if home is not None and before_first_step is not None and run.step == 0:
                    checkpoint.save(home, before_first_step, 0)
                return run.finish(objective, found)
            again = functools.partial(_evaluate, objective, run.step)
            run.update.step(found, again, run.kept())
            run.step += 1
            bar.update()
            if home is not None:
                reads.read()  # Only finite values are stored. Without a folder the next step checks the update.
                run.save(home)
    return run.finish(objective)


def _evaluate(objective: Objective, step: int, latents: list[Tensor], values: dict[str, list[Tensor]]) -> Evaluation:
    """The losses and gradients of other values, for an optimizer that evaluates the loss several times."""
    return objective.evaluate(latents, step, values)
