"""A chain whose noise, conditions, guidance scale and weights are given at every call, as variables."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.replaced_conditions import (
    GUIDANCE_SCALE,
    WEIGHTS,
    ReplacedConditions,
    denoiser_of,
    named_conditions,
    trained_places,
    with_replaced,
)
from .variables import NOISE, START, VariableOptions

Values = Mapping[str, list[Tensor]]


class BoundChain:
    """Calls a chain with the values of variables.

    Args:
        chain: The caller's chain. It stays as it is, and so do the weights of its network: where conditions or weights
            are variables, a copy of it is called.
        variables: The variables and their options.
        x: The starting latents.
        per_sample: Whether every sample of the batch gets variables of its own.
        seed: Of the noise of the steps, where the chain has none yet.

    Attributes:
        chain: The chain that is called.
        initial: Where each variable but the start begins.
        weight_names: The names of the weights that are variables, in the order of their tensors.

    Raises:
        ValueError: The chain does not have one of the variables.
    """

    def __init__(
        self, chain: Any, variables: Mapping[str, VariableOptions], x: Tensor, per_sample: bool, seed: int
    ) -> None:
        self.chain = chain
        self.initial: dict[str, list[Tensor]] = {}
        self.weight_names: tuple[str, ...] = ()
        self._places: dict[str, list[list[int]]] = {}
        others = [name for name in variables if name not in (START, NOISE)]
        if others:
            self._bind_conditions(others, x, per_sample)
        if NOISE in variables:
            self._bind_noise(x, per_sample, seed)
        if WEIGHTS not in variables:
            _warn_of_trained_weights(chain)
        for name, options in variables.items():
            if options.value is not None:
                self.initial[name] = _given(name, options.value, self.initial[name])
            if name in others and per_sample:
                self.initial[name] = [_for_each(name, t, x.shape[0]) for t in self.initial[name]]

    def _bind_noise(self, x: Tensor, per_sample: bool, seed: int) -> None:
        """Finds the noise of the steps: the chain's own, or what a seed gives."""
        if not getattr(self.chain, "num_draws", 0):
            raise ValueError(
                f"variables['noise']: expected a chain whose steps add noise, got {type(self.chain).__name__}; use "
                "doodl_fast.LCM, RexSDE, or a Sampler of an ancestral scheduler"
            )
        noise = self.chain.step_noise
        if noise is None:
            # Another seed than that of the perturbation, which would draw the same numbers.
            like = x[:1] if per_sample else x
            noise = [z.expand_as(x).contiguous() for z in self.chain.draw_noise(like, seed=seed + 1)]
        self.initial[NOISE] = [z.detach() for z in noise]

    def _bind_conditions(self, names: list[str], x: Tensor, per_sample: bool) -> None:
        """Makes a copy of the chain whose denoiser gets the variables, and finds where they begin."""
        denoiser = denoiser_of(getattr(self.chain, "evaluator", None))
        if denoiser is None:
            raise ValueError(
                f"variables[{names[0]!r}]: expected a chain of a Denoiser, got {type(self.chain).__name__}; 'start' is "
                "the variable of any other function"
            )
        places, tensors = named_conditions(denoiser), denoiser.tensors()
        scale = None
        for name in names:
            if name == GUIDANCE_SCALE:
                if not denoiser.guided or denoiser.combine is not None:
                    raise ValueError(
                        "variables['guidance_scale']: expected a chain with classifier-free guidance by its usual "
                        f"formula, got {denoiser!r}{' with combine=' if denoiser.combine else ' without it'}"
                    )
                scale = torch.full((1,), denoiser.guidance_scale, dtype=torch.promote_types(x.dtype, torch.float32))
                self.initial[name] = [scale.to(x.device)]
                continue
            if name == WEIGHTS:
                self._bind_weights(denoiser, per_sample)
                continue
            if name not in places:
                known = [START, NOISE, GUIDANCE_SCALE, *places, WEIGHTS]
                raise ValueError(f"variables: expected names among {', '.join(known)} for this chain, got {name!r}")
            # Guidance by a pair may hold one tensor twice; it is one variable.
            groups: dict[int, list[int]] = {}
            for place in places[name]:
                groups.setdefault(id(tensors[place]), []).append(place)
            self._places[name] = list(groups.values())
            self.initial[name] = [tensors[group[0]].detach() for group in self._places[name]]
        self._replaced = ReplacedConditions(denoiser, scale)
        self.chain = with_replaced(self.chain, self._replaced)

    def _bind_weights(self, denoiser: Denoiser, per_sample: bool) -> None:
        """Finds the trained weights of a denoiser."""
        if per_sample:
            raise ValueError(
                "variables['weights']: expected per_sample=False, as the samples of a batch share the weights of their "
                "network and are not independent; optimise each sample in a run of its own"
            )
        places, tensors = trained_places(denoiser), denoiser.tensors()
        if not places:
            raise ValueError(
                f"variables['weights']: expected a chain with trained weights, got {denoiser!r} without any; make it "
                "with trainable=True of from_pipeline or Denoiser (docs/weights.md)"
            )
        self.weight_names = tuple(places)
        self._places[WEIGHTS] = [[place] for place in places.values()]
        self.initial[WEIGHTS] = [tensors[place].detach() for place in places.values()]

    def __call__(self, start: list[Tensor], values: Values) -> tuple[Tensor, ...]:
        """Runs the chain.

        Args:
            start: The starting latents.
            values: The tensors of each variable.
        """
        if GUIDANCE_SCALE in values:
            self._replaced.scale = values[GUIDANCE_SCALE][0]
        for name, groups in self._places.items():
            for group, tensor in zip(groups, values[name], strict=True):
                self._replaced.replaced.update(dict.fromkeys(group, tensor))
        options = {"noise": values[NOISE]} if NOISE in values else {}
        ends: tuple[Tensor, ...] = self.chain(*start, **options)
        return ends


def _warn_of_trained_weights(chain: Any) -> None:
    """Says that the chain's trained weights stay as they are."""
    denoiser = denoiser_of(getattr(chain, "evaluator", None))
    if denoiser is not None and denoiser.trainable:
        warnings.warn(
            f"chain: {len(denoiser.trainable)} weights of its network are trained, and 'weights' is not among the "
            "variables, so they stay as they are and their gradients are computed for nothing; add 'weights' to "
            "variables, or make the chain without trainable=",
            RuntimeWarning,
            stacklevel=5,
        )


def _given(name: str, value: Any, own: list[Tensor]) -> list[Tensor]:
    """The value that the caller gave a variable, like the chain's own in everything but the rows of the batch."""
    tensors = [value] if isinstance(value, Tensor) else list(value) if isinstance(value, (list, tuple)) else []
    if not tensors and isinstance(value, (int, float)):
        tensors = [torch.full_like(own[0], float(value))]
    rows = name != WEIGHTS  # of a batch, of which there may be more or fewer
    fits = len(tensors) == len(own) and all(
        isinstance(t, Tensor)
        and t.is_floating_point()
        and (t.shape == o.shape or (rows and t.shape[1:] == o.shape[1:]))
        for t, o in zip(tensors, own, strict=True)
    )
    if not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in own)
        got = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in tensors or [value])
        raise ValueError(f"variables[{name!r}]: expected a value of {len(own)} tensor(s) of shape {shapes}, got {got}")
    return [t.detach().to(o.device) for t, o in zip(tensors, own, strict=True)]


def _for_each(name: str, tensor: Tensor, batch: int) -> Tensor:
    """A tensor with a row for each sample."""
    if tensor.ndim == 0 or tensor.shape[0] not in (1, batch):
        raise ValueError(
            f"variables[{name!r}]: expected 1 or {batch} rows with per_sample=True, got {tuple(tensor.shape)}"
        )
    return tensor.expand(batch, *tensor.shape[1:]).contiguous()
