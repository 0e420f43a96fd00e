"""A denoiser whose conditions, guidance scale and weights are other tensors at every run, with gradients for them."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chain.evaluator import Evaluator, Recordings, as_evaluator, guided_output
from .conditions import map_tensors
from .denoiser import Denoiser

GUIDANCE_SCALE, WEIGHTS = "guidance_scale", "weights"
COMMON_NAMES = {"cond": "prompt_embeds", "uncond": "negative_prompt_embeds"}
"""What `diffusers` calls the conditions of a `Denoiser`."""


def named_conditions(denoiser: Denoiser) -> dict[str, list[int]]:
    """Where the conditions of a denoiser are in what `tensors()` returns, by the names that users know.

    Args:
        denoiser: The network with its conditions.

    Returns:
        The places of each condition: "prompt_embeds", "negative_prompt_embeds", and every further argument of the
        network that holds tensors, such as "controlnet_cond" or "text_embeds".
    """
    paths: list[str] = []
    map_tensors(denoiser._conditions(), lambda _leaf, name: paths.append(name))
    found: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        words = re.findall(r"'([^']+)'", path)
        names = [COMMON_NAMES[path]] if path in COMMON_NAMES else words
        for name in dict.fromkeys(names):
            found.setdefault(name, []).append(place)
    return found


def trained_places(denoiser: Denoiser) -> dict[str, int]:
    """Where the trained weights of a denoiser are in what `tensors()` returns, by their names in the network."""
    names = {id(weight): name for name, weight in denoiser.weights()}
    first = len(denoiser.tensors()) - len(denoiser.trainable)
    return {names[id(weight)]: first + index for index, weight in enumerate(denoiser.trainable)}


class ReplacedConditions(Evaluator):
    """A denoiser that is evaluated with other conditions and weights, and with a guidance scale that is a tensor.

    Args:
        inner: The denoiser.
        scale: The guidance scale, () or (B,), or None for the denoiser's own.
        replaced: By place in what `tensors()` returns, the tensor that is there instead. It may be changed between
            runs.
    """

    def __init__(self, inner: Denoiser, scale: Tensor | None = None, replaced: dict[int, Tensor] | None = None) -> None:
        self.inner, self.scale, self.replaced = inner, scale, replaced or {}

    @property
    def guidance_scale(self) -> float:
        """That of the denoiser."""
        return self.inner.guidance_scale

    def tensors(self) -> tuple[Tensor, ...]:
        """The conditions, and the guidance scale behind them if it is a tensor."""
        own = tuple(self.replaced.get(place, tensor) for place, tensor in enumerate(self.inner.tensors()))
        return own if self.scale is None else (*own, self.scale)

    def __call__(
        self,
        x: Tensor,
        t: Any,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Predicts the noise; see `Denoiser`."""
        return guided_output(self.raw(x, t, tensors, latents_dtype), x.dtype)

    def raw(
        self,
        x: Tensor,
        t: Any,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, float | None]:
        """Evaluates the network; see `Denoiser`. A guidance scale that is a tensor is applied here."""
        given = self.tensors() if tensors is None else tuple(tensors)
        if self.scale is None:
            return self.inner.raw(x, t, given, latents_dtype)
        eps, _ = self.inner.raw(x, t, given[:-1], latents_dtype)
        uncond, cond = eps.to(torch.promote_types(x.dtype, torch.float32)).chunk(2)
        weight = given[-1].to(uncond).reshape(-1, *[1] * (x.ndim - 1))
        return uncond + weight * (cond - uncond), None

    def _around(self, inner: Denoiser | None) -> ReplacedConditions | None:
        """The same for another form of the denoiser."""
        if inner is None:
            return None
        other = copy.copy(self)
        other.inner = inner
        return other

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        """See `Evaluator`."""
        return self.inner.compute_dtype(latents_dtype)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """See `Evaluator`."""
        return self.inner.running()

    def for_vjp(self) -> Evaluator | None:
        """See `Evaluator`."""
        return self._around(self.inner.for_vjp())

    def for_blocks(self) -> Evaluator | None:
        """See `Evaluator`."""
        return self._around(self.inner.for_blocks())

    def for_recompute(self) -> Evaluator | None:
        """See `Evaluator`."""
        return self._around(self.inner.for_recompute())

    def plain(self) -> Evaluator:
        """See `Evaluator`."""
        return self._around(self.inner.plain()) or self

    def recordings(self, device: torch.device) -> Recordings | None:
        """See `Evaluator`."""
        return self.inner.recordings(device)

    def launched(self) -> Evaluator:
        """See `Evaluator`."""
        return self._around(self.inner.launched()) or self

    @property
    def insists_on_vjps(self) -> bool:
        """See `Evaluator`."""
        return self.inner.insists_on_vjps

    def weights(self) -> tuple[tuple[str, Tensor], ...]:
        """See `Evaluator`. Weights in whose place others are used do not count."""
        own = self.inner.tensors()
        unused = {id(own[place]) for place in self.replaced}
        return tuple((name, weight) for name, weight in self.inner.weights() if id(weight) not in unused)


def denoiser_of(evaluator: Any) -> Denoiser | None:
    """The denoiser that an evaluator is, or that a solver's own evaluator calls as its `network`; None without one."""
    inner = evaluator if isinstance(evaluator, Denoiser) else getattr(evaluator, "network", None)
    return inner if isinstance(inner, Denoiser) else None


def with_replaced(chain: Any, replaced: ReplacedConditions) -> Any:
    """A copy of a chain that calls `replaced` in the place of its denoiser. The chain itself stays as it is."""
    evaluator: Any = replaced
    if not isinstance(chain.evaluator, Denoiser):
        evaluator = copy.copy(chain.evaluator)
        evaluator.network = replaced
    other = copy.copy(chain)
    other._runs = copy.copy(chain.runs)
    other._runs.evaluator = as_evaluator(evaluator)
    other.memory = chain.memory  # makes a planner of its own where one is needed
    return other
