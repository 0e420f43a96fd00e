"""What a run checks about itself, and what a chain says of it, once.

Checked are where numbers stop being finite, whether the undone start is the start, whether the network returns the same
value twice, and what reaches the network or its gradient that a chain cannot heed. All numbers are measured on the
device, by one small reduction a network call, and read once at the end of a pass.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .evaluator import Evaluator
from .host_reads import check_later
from .program import Coupling, Program
from .transforms import is_wrapped
from .weights import listed, trained_subset

HALF_TOLERANCE, TOLERANCE = 1e-3, 1e-5
"""The drift that is tolerated in floating point, with an fp16 or bf16 network or a float32 state, and otherwise. The
gradient's error is about as large as the drift (docs/precision.md)."""
ROUNDING_TOLERANCE = 1e-2
"""The relative error of an fp16 cotangent, by numbers too small for fp16, above which a warning is given."""
CAUSES = (
    "a network that does not return the same bits twice: nondeterministic kernels "
    "(torch.use_deterministic_algorithms(True)), torch.backends.cudnn.benchmark, kernels that depend on grad mode, "
    "dropout or other noise"
)


@dataclass
class Trust:
    """What a chain remembers of its runs' checks.

    Attributes:
        tolerance: The largest drift, and the largest mismatch, that is accepted. None: the defaults, by dtype.
        drift: How far the latest backward pass that undid couplings missed what was stored; None before any.
        mismatch: How far the network's values in the latest backward pass were from those of its forward run, relative;
            None before any pass that compared them.
        said: What the chain has warned of.
    """

    tolerance: float | None = None
    drift: float | None = None
    mismatch: float | None = None
    said: set[str] = field(default_factory=set)

    def within_tolerance(self, drift: float, exact: bool, half: bool) -> bool:
        """Notes a run's drift; returns False, and warns the first time, if it is above the tolerance."""
        self.drift = drift
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = 0.0 if exact else HALF_TOLERANCE if half else TOLERANCE
        if drift <= tolerance:  # This is False for NaN.
            return True
        rounding = (
            ""
            if exact
            else ", or rounding, which undoing EDICT's mixing amplifies by 1/p^2 a step (use "
            'arithmetic="exact", memory="checkpoint" or an int k)'
        )
        self._warn(
            "network",
            f"drift: undoing the chain missed its start by {drift:.2g} (relative; tolerance {tolerance:.2g}), so "
            f"the gradient was computed again from checkpoints, for one more forward run. Look for {CAUSES}{rounding}. "
            "Said once per chain; chain.drift has the latest number",
        )
        return False

    def note_mismatch(self, mismatch: float, tolerance: float) -> None:
        """Notes how far a backward pass's values of the network were from its forward run's; warns the first time that
        it is more than rounding explains."""
        self.mismatch = mismatch
        tolerance = tolerance if self.tolerance is None else self.tolerance
        if not mismatch <= tolerance:  # This is True for NaN.
            self._warn(
                "network",
                f"mismatch: the network's values in the backward pass differ from those of the forward run by "
                f"{mismatch:.2g} (relative; tolerance {tolerance:.2g}), so the gradient is not that of the result. "
                f"Look for {CAUSES}. Said once per chain; chain.mismatch has the latest number",
            )

    def note_rounding(self, error: float) -> None:
        """Warns the first time that fp16 cotangents have lost too much of their numbers; see `cotangent_rounding`."""
        if not error <= ROUNDING_TOLERANCE:
            found = "are not finite" if math.isnan(error) else "are all zero" if math.isinf(error) else ""
            self._warn(
                "rounding",
                f"cotangents: those of the float16 latents {found or f'have lost about {error:.1g} of themselves'}, "
                "because autograd gives a cotangent its tensor's dtype and the loss's gradient does not lie in "
                "float16's range; the chain's gradient cannot be better than they are. Pass float32 latents, x.float(),"
                " or scale the loss. Said once per chain",
            )

    def note_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Warns the first time that some of the network's weights require grad, which a chain gives them none of."""
        if "weights" in self.said or not torch.is_grad_enabled():
            return
        names = trained_subset(weights)
        if names:
            self._warn(
                "weights",
                f"weights: {len(names)} of the network's require grad ({listed(names)}), but a chain computes gradients"
                " of its latents and conditions only, so these weights get none. Ask for them by trainable=True of "
                "Denoiser or from_pipeline (docs/weights.md), or call requires_grad_(False) on them. "
                "Said once per chain",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            warnings.warn(message, RuntimeWarning, stacklevel=3)


_SHAPE = re.compile(r"\b(sizes?|shapes?|dim(ension)?s?|dimensional|channels|values to unpack)\b", re.IGNORECASE)


@contextlib.contextmanager
def explain_first_evaluation(evaluator: Evaluator, source: Tensor, started: bool = False) -> Iterator[None]:
    """Turns an error about shapes that a network raises at its first evaluation into one that names the latents.

    Args:
        evaluator: The network.
        source: The latents, in the dtype of the chain's state.
        started: Whether the run has evaluated the network before, so that errors pass unchanged.

    Raises:
        ValueError: With the latents' shape, the network's name and what it said.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        said = " ".join(str(error).split())
        known = type(error) in (RuntimeError, ValueError, IndexError) and _SHAPE.search(said)
        if started or not known or re.match(r"[\w\[\]']+: expected", said):
            raise
        raise ValueError(
            f"x: expected latents of a shape that the network takes, got {tuple(source.shape)}; {evaluator!r} says: "
            f"{said[:300]}"
        ) from error


def cotangent_rounding(cotangents: Sequence[Tensor]) -> Tensor:
    """The relative error, in the 2-norm, that fp16's smallest spacing of 2^-24 has left in cotangents; 0-dim.

    Inf if all are zero (that is what a loss that is too small looks like), and NaN if one is not finite.
    """
    wide = [cotangent.detach().float() for cotangent in cotangents]
    size = torch.stack([torch.linalg.vector_norm(z) for z in wide]).norm()
    # Rounding to a multiple of s errs by s / sqrt(12) on average; only numbers below 2^-14 are that coarse.
    coarse = torch.stack([(z.abs() < 2.0**-14).sum() for z in wide]).sum()
    return torch.where(size > 0, coarse.sqrt() * (2.0**-24 / 12**0.5) / size, size.new_tensor(torch.inf)) + 0 * size


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
    """Finds where NaN or Inf first appeared in one pass, by the largest magnitude after each network call.

    Args:
        program: The couplings.
        kind: "forward" or "VJP".
        network_dtype: The dtype that the network computes in, which the error's advice depends on.
    """

    def __init__(self, program: Program, kind: str, network_dtype: torch.dtype) -> None:
        self._program, self._kind, self._dtype = program, kind, network_dtype
        self._places: list[Coupling | None] = []
        self._largest: list[Tensor] = []

    @property
    def started(self) -> bool:
        """Whether anything was noted."""
        return bool(self._places)

    def note(self, tensor: Tensor, coupling: Coupling | None) -> None:
        """Notes the largest magnitude of a tensor that a coupling made, or that the pass was given (None).

        Integers cannot hold NaN or Inf, and the values of tensors under a transform cannot be read.
        """
        if tensor.is_floating_point() and tensor.numel() and not is_wrapped(tensor):
            self._places.append(coupling)
            self._largest.append(torch.linalg.vector_norm(tensor.detach(), torch.inf))

    def read(self, *others: Tensor) -> list[float]:
        """Reads the notes for `check`, and returns `others` (0-dim tensors) as numbers, in one synchronisation."""
        if not self._largest and not others:
            return []
        dtype = self._largest[0].dtype if self._largest else others[0].dtype
        values: list[float] = torch.stack([*(other.to(dtype) for other in others), *self._largest]).tolist()
        self._values = values[len(others) :]
        return values[: len(others)]

    def check_later(self) -> None:
        """Reads the notes and does `check`: at once, or inside `host_reads.together()` with what else is read."""

        def check(values: list[float]) -> None:
            self._values = values
            self.check()

        if self._largest:
            check_later(torch.stack(self._largest), check)

    def check(self) -> None:
        """Raises FloatingPointError for the first place that is not finite, unless the pass was given what is not."""
        if not self._largest:
            return
        for place, value in zip(self._places, self._values, strict=True):
            if not math.isfinite(value):
                if place is not None:
                    raise FloatingPointError(self._message(place))
                return

    def _message(self, coupling: Coupling) -> str:
        """The error's text: the place, and what to try."""
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
