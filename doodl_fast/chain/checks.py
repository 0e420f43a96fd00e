"""What a run checks about itself: where numbers stopped being finite, and whether the undone start is the start.

Both are measured on the device, by one small reduction a network call, and read once at the end of a pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .program import Coupling, Program

HALF_TOLERANCE, TOLERANCE = 1e-3, 1e-5
"""Drift that a floating-point run bears, with an fp16 or bf16 network or a float32 state, and otherwise. The gradient's
error is about as large as the drift (docs/precision.md)."""


@dataclass
class Trust:
    """What a chain remembers of its runs' checks.

    tolerance: the largest drift that is borne; None: the default, which is 0 in exact arithmetic.
    drift: of the last backward pass that undid couplings; None before any.
    """

    tolerance: float | None = None
    drift: float | None = None
    warned: bool = False

    def bears(self, drift: float, exact: bool, half: bool) -> bool:
        """Notes a run's drift; False, and a warning the first time, if it is above the tolerance."""
        self.drift = drift
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = 0.0 if exact else HALF_TOLERANCE if half else TOLERANCE
        if drift <= tolerance:  # False for NaN
            return True
        if not self.warned:
            self.warned = True
            rounding = (
                ""
                if exact
                else ", or rounding, which undoing EDICT's mixing amplifies by 1/p^2 a step (use "
                'arithmetic="exact", memory="checkpoint" or an int k)'
            )
            warnings.warn(
                f"drift: undoing the chain missed its start by {drift:.2g} (relative; tolerance {tolerance:.2g}), so "
                "the gradient was computed again from checkpoints, for one more forward run. Look for a network that "
                "does not return the same bits twice: nondeterministic kernels "
                "(torch.use_deterministic_algorithms(True)), torch.backends.cudnn.benchmark, kernels that depend on "
                f"grad mode, dropout or other noise{rounding}. Said once per chain; chain.drift has the latest number",
                RuntimeWarning,
                stacklevel=2,
            )
        return False


def distance(rebuilt: Sequence[Tensor], stored: Sequence[Tensor]) -> Tensor:
    """The relative difference `|rebuilt - stored| / |stored|` of two states, as a 0-dim tensor on their device.

    A state of integers has a buffer beside each value, in the second half of the list. There the result is at least the
    share of elements that differ in any of the tensors, so 0 means that the states are equal to the bit.
    """
    exact = not stored[0].is_floating_point()
    wide = torch.float32 if stored[0].device.type == "mps" else torch.float64
    values = len(stored) // 2 if exact else len(stored)
    total = torch.zeros(2, dtype=wide, device=stored[0].device)
    for got, want in zip(rebuilt[:values], stored[:values], strict=True):
        total += torch.stack([(got.to(wide) - want.to(wide)).square().sum(), want.to(wide).square().sum()])
    result = (total[0] / total[1].clamp_min(torch.finfo(wide).tiny)).sqrt()
    if exact:
        unequal = [(got != want).to(wide).mean() for got, want in zip(rebuilt, stored, strict=True) if want.numel()]
        result = torch.stack([result, *unequal]).amax()
    return result


def _name(value: int) -> str:
    """How messages call a value of a program."""
    return "xy"[value] if value < 2 else f"latent {value}"


class Watch:
    """Where NaN or Inf first appeared in one pass over a program: the largest magnitude after each network call.

    network_dtype: what the advice depends on.
    """

    def __init__(self, program: Program, kind: str, network_dtype: torch.dtype) -> None:
        self._program, self._kind, self._dtype = program, kind, network_dtype
        self._places: list[Coupling | None] = []
        self._largest: list[Tensor] = []

    def note(self, tensor: Tensor, coupling: Coupling | None) -> None:
        """tensor: what the coupling made; None for what the pass was given. Integers cannot hold NaN or Inf."""
        if tensor.is_floating_point() and tensor.numel():
            self._places.append(coupling)
            self._largest.append(torch.linalg.vector_norm(tensor.detach(), torch.inf))

    def read(self, *others: Tensor) -> list[float]:
        """`others` (0-dim) as numbers, and with them, in the same synchronisation, the notes, for `check`."""
        if not self._largest and not others:
            return []
        dtype = self._largest[0].dtype if self._largest else others[0].dtype
        values: list[float] = torch.stack([*(other.to(dtype) for other in others), *self._largest]).tolist()
        self._values = values[len(others) :]
        return values[: len(others)]

    def check(self) -> None:
        """Raises FloatingPointError for the first place that is not finite; not if what came in was not finite."""
        if not self._largest:
            return
        for place, value in zip(self._places, self._values, strict=True):
            if not math.isfinite(value):
                if place is not None:
                    raise FloatingPointError(self._message(place))
                return

    def _message(self, coupling: Coupling) -> str:
        steps = 1 + max(c.step for c in self._program)
        changed, read = _name(coupling.target), _name(coupling.source)
        where = (
            f"step {coupling.step} of 0 to {steps - 1}, timestep {coupling.tag}, the coupling that updates {changed}"
        )
        half = self._dtype in (torch.float16, torch.bfloat16)
        dtype = str(self._dtype).removeprefix("torch.")
        if self._kind == "forward":
            cure = f"the network at {read} overflowed or met bad input"
            if self._dtype == torch.float16:
                cure += " in float16: run it in bfloat16 or float32, e.g. unet.to(torch.bfloat16)"
            else:
                cure += f" in {dtype}: check its weights and conditions, or try a lower guidance_scale"
            return f"forward: NaN or Inf first appeared at {where}; all before it was finite; {cure}"
        cure = f"the network's derivative at {read} is not finite in {dtype}: "
        cure += "run it in float32" if half else "look for a root, norm or division at zero in it"
        return (
            f"VJP: NaN or Inf first appeared at {where}; the loss's gradient and all couplings after it were finite; "
            f"{cure}"
        )
