"""Optimising latents: the loop, the update of the latents, what is stored so that a run can be resumed.

`one_step_guidance.py` has the baseline that guides by an estimate of the finished picture at every step.
"""

from __future__ import annotations

from .loop import Result, StepInfo, optimize
from .one_step_guidance import OneStepGuidance, one_step
from .update import UpdateSettings

__all__ = ["OneStepGuidance", "Result", "StepInfo", "UpdateSettings", "one_step", "optimize"]
