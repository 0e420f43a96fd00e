"""The forms of a `Denoiser`: the same function with more or less in its graphs, in another dtype, never replayed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..chain.evaluator import Evaluator
from ..frozen import Level, gains_by_recompute
from .active_calls import Variant
from .cuda_graphs import CudaGraphs
from .hooks import first_weight
from .module_copies import why_not_cast
from .networks import HALF_DTYPES, has_blocks, scales_adapters

if TYPE_CHECKING:
    from typing_extensions import Self

AUTO = "auto"


class DenoiserForms(Evaluator):
    """What a `Denoiser` knows of its other forms. All have the same network, conditions and recordings."""

    _unet: Callable[..., Any]
    _unet_kwargs: dict[str, Any]
    _module: nn.Module | None
    _vjp_dtype: torch.dtype | str | None
    _variant: Variant
    _cuda_graphs: CudaGraphs
    _said: list[str]

    def for_vjp(self) -> Self | None:
        """The same denoiser with weights in `vjp_dtype`; None where VJPs are taken of this one.

        Raises:
            ValueError: `vjp_dtype` names a dtype, and no copy of the network with cast weights can be made.
        """
        dtype, found = self._vjp_dtype, first_weight(self._module)
        if dtype == AUTO:
            slow = found is not None and found[0].device.type == "cpu" and found[1] in HALF_DTYPES
            dtype = torch.float32 if slow else None
        if not isinstance(dtype, torch.dtype) or self._module is None:
            return None
        reason = why_not_cast(self._module, self._unet)
        if reason is not None:
            self._refuse_cast(reason)
            return None
        other = copy.copy(self)
        other._vjp_dtype, other._variant = None, replace(self._variant, cast_to=dtype)
        return other

    def _refuse_cast(self, reason: str) -> None:
        """Says why VJPs cannot be taken in another dtype: by an error if that was asked for, else by one warning."""
        what = f"vjp_dtype: VJPs in another dtype need a copy of the network, which cannot be made because {reason}"
        if self._vjp_dtype != AUTO:
            raise ValueError(f"{what}; use vjp_dtype=None, or cast the network's weights before")
        if not self._said:
            self._said.append(what)
            warnings.warn(
                f"{what}; they are taken in the network's own dtype. Use vjp_dtype=None to ask for that",
                RuntimeWarning,
                stacklevel=4,
            )

    def for_blocks(self) -> Self | None:
        """The same denoiser, whose network keeps its blocks' inputs alone and computes the rest again for a gradient.

        It is None if the network has no blocks that can be checkpointed, or if it is given a scale for its LoRA
        adapters, which holds for the length of a call and not when a block is computed again.
        """
        if not has_blocks(self._module) or scales_adapters(self._module, self._unet_kwargs):
            return None
        other = copy.copy(self)
        other._variant = replace(self._variant, checkpoints=True)
        return other

    def for_recompute(self) -> Self | None:
        """The same denoiser, whose graphs keep less than `lean=True` and compute some matrix products again.

        It is None if the network has no layers for which that makes a difference.
        """
        if self._variant.lean is not Level.ON or self._module is None or not gains_by_recompute(self._module):
            return None
        return self._with_level(Level.RECOMPUTE)

    def plain(self) -> Self:
        """The same denoiser, whose graphs are those of plain PyTorch."""
        return self._with_level(Level.OFF).launched()

    def launched(self) -> Self:
        """The same denoiser, whose calls are never replayed."""
        other = copy.copy(self)
        other._cuda_graphs = CudaGraphs(False)
        return other

    def recordings(self, device: torch.device) -> CudaGraphs | None:
        """The recordings of calls on a device; None if none can be made there."""
        return self._cuda_graphs if self._cuda_graphs.records_on(device) else None

    def _with_level(self, level: Level) -> Self:
        other = copy.copy(self)
        other._variant = replace(self._variant, lean=level)
        return other

    @property
    def insists_on_vjps(self) -> bool:
        """Whether `vjp_dtype` names a dtype, which plain autograd through the network would not heed."""
        return isinstance(self._vjp_dtype, torch.dtype)
