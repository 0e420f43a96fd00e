"""The coupling on a lattice of integers: `target <- target +- rint(c source + b eps)`, undone exactly.

target and source are int32 or int64, numbers of units whose size the caller knows; c is in target's units per unit of
source, b in target's units. Adding and subtracting an integer are exact, so the coupling with `undo` gives back the
very target, as long as source and eps have the same bits (EDICT, arXiv 2211.12446, on the additive couplings of
reversible networks, arXiv 1707.04585). Guidance as in `coupling`: eps = [uncond; cond] of (2B, ...) and g.

Arithmetic. All in float64, no multiplication contracted with an addition, in this order, `.` a rounding:

    e = u + g.(c - u) ;  v = c.source ;  v = v + b.e ;  step = rint(v), ties to even ;  out = target + or - step

The rest is integer arithmetic, so every backend gives the same bits. Where |v| reaches 2^51, or the result leaves the
range (`limit`), the element becomes 0 and `faults[row, 0]` 1; where e is NaN or Inf, `faults[row, 1]` becomes 1 as
well. Nothing ever wraps, and nothing synchronises: the caller reads the table when he likes, and discards the results.

Shapes: target, source (B, ...) alike; outputs are contiguous. Not differentiable: rounding has no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.registry import eager, select
from .coupling_op import combined
from .layout import check_eps, check_floating, check_same
from .transforms import is_plain, refuse_transforms

LARGEST_MOVE = 2.0**51
LIMITS = {torch.int32: 2**31 - 1, torch.int64: 2**49}


def limit(dtype: torch.dtype) -> int:
    """The largest magnitude that an integer of the lattice may have; int64's stay exact as float64."""
    return LIMITS[dtype]


def lattice_coupling(
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int = 0,
    c: float = 0.0,
    b: float = 0.0,
    g: float | None = None,
    undo: bool = False,
) -> Tensor:
    """`target + rint(c source + b eps)`, or minus with `undo`: a new tensor.

    target, source: (B, ...), int32 or int64, within +-`limit`. eps: (B, ...), or (2B, ...) = [uncond; cond] when g is
    given, or None. faults: (rows, 2) int32 on their device, whose entries of `row` are set to 1 by a fault.
    Raises ValueError or TypeError, naming the argument, and RuntimeError where a derivative is asked for.
    """
    if is_plain(target, source, eps, faults):
        return _lattice_coupling_forward(target, source, eps, faults, row, c, b, g, undo)
    refuse_transforms("lattice_coupling", eps)
    out: Tensor = torch.ops.doodl_fast.lattice_coupling(target, source, eps, faults, row, c, b, g, undo)
    return out


def check_lattice(
    target: Tensor, source: Tensor, eps: Tensor | None, faults: Tensor, row: int, g: float | None
) -> None:
    """Raises ValueError or TypeError, naming the argument, for operands that do not fit together."""
    if target.dtype not in LIMITS:
        raise TypeError(f"target: expected int32 or int64, got {target.dtype}")
    check_same("target", target, source=source)
    check_floating(eps=eps)
    check_eps(target, eps, g)
    if faults.dtype != torch.int32 or faults.ndim != 2 or faults.shape[1] != 2 or not faults.is_contiguous():
        raise ValueError(f"faults: expected (rows, 2) of int32, contiguous, got {tuple(faults.shape)} {faults.dtype}")
    if faults.device != target.device:
        raise ValueError(f"faults: expected the target's device {target.device}, got {faults.device}")
    if not 0 <= row < faults.shape[0]:
        raise ValueError(f"row: expected one of the {faults.shape[0]} rows of faults, got {row}")


def _lattice_coupling_forward(
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    c: float,
    b: float,
    g: float | None,
    undo: bool,
) -> Tensor:
    check_lattice(target, source, eps, faults, row, g)
    out = torch.empty_like(target, memory_format=torch.contiguous_format)
    if out.numel():
        select("lattice_coupling", target)(
            out,
            target.contiguous(),
            source.contiguous(),
            None if eps is None else eps.contiguous(),
            faults,
            row,
            c,
            b,
            g,
            undo,
        )
    return out


# The reference kernel


def within(n: Tensor, good: Tensor | None, dtype: torch.dtype, faults: Tensor, row: int) -> Tensor:
    """n (int64) where it is good and in the dtype's range, else 0 and a fault."""
    fits = n.abs() <= limit(dtype)
    if good is not None:
        fits = fits & good
    faults[row, 0] |= (~fits).any()
    return torch.where(fits, n, 0)


def moved(n: Tensor, v: Tensor, undo: bool, dtype: torch.dtype, faults: Tensor, row: int) -> Tensor:
    """n (int64) + rint(v), or minus."""
    small = v.abs() < LARGEST_MOVE  # false for NaN
    step = torch.where(small, v, 0.0).round().to(torch.int64)
    return within(n - step if undo else n + step, small, dtype, faults, row)


def coupled(
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    c: float,
    b: float,
    g: float | None,
    undo: bool,
) -> Tensor:
    """The coupling in int64."""
    v = source.double() * c
    if eps is not None:
        e = combined(eps, g, torch.float64)
        faults[row, 1] |= (~torch.isfinite(e)).any()
        v = v + e * b
    return moved(target.long(), v, undo, target.dtype, faults, row)


@eager
def _lattice_coupling(
    out: Tensor,
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    c: float,
    b: float,
    g: float | None,
    undo: bool,
) -> None:
    out.copy_(coupled(target, source, eps, faults, row, c, b, g, undo))


# Registration


@torch.library.custom_op(
    "doodl_fast::lattice_coupling",
    mutates_args=("faults",),
    schema="(Tensor target, Tensor source, Tensor? eps, Tensor(a!) faults, int row, float c, float b, float? g, "
    "bool undo) -> Tensor",
)
def _lattice_coupling_op(
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    c: float,
    b: float,
    g: float | None,
    undo: bool,
) -> Tensor:
    return _lattice_coupling_forward(target, source, eps, faults, row, c, b, g, undo)


@_lattice_coupling_op.register_fake
def _(
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    c: float,
    b: float,
    g: float | None,
    undo: bool,
) -> Tensor:
    check_lattice(target, source, eps, faults, row, g)
    return torch.empty_like(target, memory_format=torch.contiguous_format)
