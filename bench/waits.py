"""Counts how often something waits for the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


def waits(on_gpu: bool, function: Callable[[], Any]) -> Any:
    """How often a function waits for the GPU; None on a CPU."""
    if not on_gpu:
        function()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)
