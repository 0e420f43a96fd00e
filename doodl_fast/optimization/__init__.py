"""Optimising latents: the loop, the update of the latents, and the folder from which a run can be resumed.

`loop.py` has `optimize`, `objective.py` the function that it minimises, `update.py` the latent update, `checkpoint.py`
the storage. `one_step_guidance.py` has the baseline that guides by an estimate of the finished picture at every step.
"""

from __future__ import annotations

from .loop import Result, StepInfo, optimize
from .one_step_guidance import OneStepGuidance, one_step
from .update import UpdateSettings

__all__ = ["OneStepGuidance", "Result", "StepInfo", "UpdateSettings", "one_step", "optimize"]
