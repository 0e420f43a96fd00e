"""Puts the parts of an optimisation together: the update of its variables, and the function that it minimises."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import low_memory
from .binding import BoundChain
from .joint_update import JointUpdate
from .losses import NAMES, Losses
from .objective import Decode, Objective, decoder_dtype
from .result import Pair
from .update import LatentUpdate, UpdateSettings
from .variables import NOISE, START, Variable, VariableOptions

Initial = Mapping[str, list[Tensor]]


def new_update(
    latents: Pair,
    settings: UpdateSettings,
    generator: torch.Generator,
    variables: Mapping[str, VariableOptions],
    initial: Initial,
    optimizer: Any,
    scheduler: Any,
    per_sample: bool,
) -> JointUpdate:
    """Makes the update of all variables.

    Raises:
        TypeError: An optimizer or a schedule is none.
        ValueError: An optimizer mixes the samples of a batch of optimisations, or an option cannot work.
    """
    x, y = latents
    moves = START in variables
    start = variables.get(START, VariableOptions())
    if not moves:
        settings = UpdateSettings(renormalize_latents=False, tied_latents=False)
    own, schedule = start.optimizer or optimizer, start.scheduler or scheduler
    if not moves:
        own = schedule = None
    if moves and start.group and own is None and schedule is None:
        raise ValueError(
            f"variables['start']: expected optimizer= with the option {next(iter(start.group))!r}, as the update "
            "without one has none; grad_scale and clip_grad_value are its step size"
        )
    latent = LatentUpdate(x, y, settings, generator, own, schedule, dict(start.group), per_sample, start.project)
    others = {name: Variable(name, tensors, variables[name], optimizer, scheduler) for name, tensors in initial.items()}
    if per_sample and x.shape[0] > 1:
        for stepper in (latent.stepper, *(variable.stepper for variable in others.values())):
            if stepper is not None and stepper.mixes_samples:
                raise ValueError(
                    f"per_sample: expected optimizers that treat every number alone, such as Adam, got "
                    f"{stepper.label}, which would mix the samples; optimise each sample in a run of its own"
                )
    return JointUpdate(latent, others, moves)


def new_objective(
    bound: BoundChain,
    decode: Decode,
    losses: Losses,
    dtype: torch.dtype,
    update: JointUpdate,
    first_image_only: bool,
    per_sample: bool,
) -> Objective:
    """Makes the function that is minimised, with decoder and loss in versions that fit a budget of memory.

    Raises:
        TypeError: A loss has a parameter of which nothing is known.
        ValueError: A loss names what the chain does not have, or the prompts do not fit the batch.
    """
    chain, start = bound.chain, update.latents[0]
    prompts = getattr(chain, "prompts", None)
    noise = getattr(chain, "step_noise", None)
    if prompts is not None and len(prompts) not in (1, start.shape[0]):
        raise ValueError(f"latents: expected {len(prompts)} rows, one for each prompt of the chain, got {len(start)}")
    reasons = dict.fromkeys((*NAMES, *update.others), "")
    if prompts is None:
        reasons["prompts"] = "the chain has no texts; make it by from_pipeline with a prompt, or set chain.prompts"
    elif len(prompts) == 1:
        prompts = prompts * start.shape[0]
    if NOISE not in update.others and noise is None:
        reasons[NOISE] = "the chain has no noise of its steps; set chain.step_noise, or make it a variable"
    if not per_sample:
        reasons["sample"] = "only per_sample=True calls a loss for each sample"
    losses.check(reasons, len(start))
    values = update.values()
    given = {"prompts": prompts, "noise": noise, "sample": 0} | {
        name: tensors[0] if len(tensors) == 1 and name != NOISE else tensors for name, tensors in values.items()
    }
    losses = losses.with_given(**given)
    decoded = decoder_dtype(decode, dtype, start.dtype)
    decode, fitted = low_memory.fit_to_budget(chain, decode, losses, start, decoded)
    members = 1 if first_image_only else getattr(chain, "num_pictures", 2)
    return Objective(
        chain,
        decode,
        fitted,
        dtype,
        members,
        bound if values else None,
        update.moves_start,
        prompts,
        per_sample,
        tuple(values),
    )


def plain_settings(
    variables: Mapping[str, VariableOptions],
    initial: Initial,
    per_sample: bool,
    patience: int | None,
    min_delta: float,
    best_of: int,
) -> dict[str, Any]:
    """What a resumed run must have in common with the stored one, beside the settings of the latents' update.

    What has its default is None, as it is in runs that were stored before there was a choice.
    """
    return {
        "variables": None if list(variables) == [START] else sorted(variables),
        "values": {name: _hash(tensors) for name, tensors in initial.items()} or None,
        "options": {name: options.plain for name, options in variables.items() if options.plain} or None,
        "per_sample": per_sample or None,
        "patience": patience,
        "min_delta": min_delta or None,
        "best_of": best_of if best_of > 1 else None,
    }


def _hash(tensors: list[Tensor]) -> str:
    """A hash of the values of tensors, rounded to what another machine computes as well."""
    data = b"".join(t.detach().float().cpu().contiguous().numpy().round(2).tobytes() for t in tensors)
    return hashlib.sha256(data).hexdigest()
