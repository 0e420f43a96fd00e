"""Optimising latents: the loop, the update of the latents, and the folder from which a run can be resumed.

`loop.py` has `optimize`, `objective.py` the function that it minimises, `losses.py` what losses are given, `update.py`
the latent update, `variables.py` and `binding.py` all other variables, `samples.py` batches of independent
optimisations, `searching.py` the best of many starts, `checkpoint.py` the storage. `one_step_guidance.py` has the
baseline that guides by an estimate of the finished picture at every step.
"""

from __future__ import annotations

from .loop import Result, StepInfo, optimize
from .losses import Each
from .one_step_guidance import OneStepGuidance, one_step
from .searching import SearchResult, search
from .update import UpdateSettings

__all__ = [
    "Each",
    "OneStepGuidance",
    "Result",
    "SearchResult",
    "StepInfo",
    "UpdateSettings",
    "one_step",
    "optimize",
    "search",
]
