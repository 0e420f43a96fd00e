"""The Triton backend: to come."""

from __future__ import annotations

from .registry import Kernel


def why_not(device_type: str) -> str | None:
    """Why it cannot compute on a device type."""
    return "not written yet"


def kernels() -> dict[str, Kernel]:
    """None yet."""
    return {}
