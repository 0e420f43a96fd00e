"""The coupling on a lattice of integers: `target <- target + rint(c source + b eps)`, which can be undone exactly.

target and source are int32 or int64. They count units whose size the caller knows: c is in units of target per unit of
source, b in units of target. Additions and subtractions of integers are exact, so the coupling with `undo` returns the
very target, as long as source and eps have the same bits (EDICT, arXiv 2211.12446; the additive couplings of reversible
networks, arXiv 1707.04585). Guidance is as in `coupling`: eps = [uncond; cond] of shape (2B, ...), and g.

Arithmetic: it is done in float64, and no multiplication is contracted with an addition. The operations have this order,
where `.` is a multiplication and every operation rounds its result:

    e = u + g.(c - u) ;  v = c.source ;  v = v + b.e ;  step = rint(v), ties to even ;  out = target + or - step

The rest is integer arithmetic, so every backend gives the same bits. If |v| reaches 2^51, or the result is out of the
range that `limit` states, the element becomes 0 and `faults[row, 0]` becomes 1. If e is NaN or infinite,
`faults[row, 1]` becomes 1 as well. No integer ever wraps around, and nothing synchronises with the device: the caller
reads the table of faults at a time of its own choice, and discards the results if there are any.

The op has no derivative, because rounding to integers has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.registry import eager, select
from .coupling_op import combined
from .layout import check_eps, check_floating, check_same
from .registration import register, registered
from .signatures import LATTICE_COUPLING
from .transforms import is_plain, refuse_transforms

LARGEST_MOVE = 2.0**51
LIMITS = {torch.int32: 2**31 - 1, torch.int64: 2**49}


def limit(dtype: torch.dtype) -> int:
    """Returns the largest magnitude that an integer of the lattice may have. In int64 it is one that float64 holds."""
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
    """Computes `target + rint(c source + b e)`, or minus with `undo`, where e is eps, guided if `g` is given.

    Args:
        target: Integers (B, ...), int32 or int64, of a magnitude of at most `limit(target.dtype)`.
        source: Integers of target's shape, dtype and device.
        eps: The network's output, in float16, bfloat16, float32 or float64: (B, ...), or with `g` (2B, ...) =
            [uncond; cond]; or None.
        faults: A table (rows, 2) of int32 on the same device. Its entries in `row` are set to 1 by a fault.
        row: The row of the table.
        c: The factor of source.
        b: The factor of e.
        g: The guidance scale, or None if eps is not a guided batch.
        undo: Whether to subtract, which undoes an earlier call.

    Returns:
        A new contiguous tensor of target's shape and dtype.

    Raises:
        ValueError: Shapes, devices or numbers do not fit.
        TypeError: A dtype does not fit.
        RuntimeError: A derivative or a batched call is asked for.
    """
    if is_plain(target, source, eps, faults):
        return _lattice_coupling_forward(target, source, eps, faults, row, c, b, g, undo)
    refuse_transforms("lattice_coupling", eps)
    out: Tensor = registered.lattice_coupling(target, source, eps, faults, row, c, b, g, undo)
    return out


def check_lattice(
    target: Tensor, source: Tensor, eps: Tensor | None, faults: Tensor, row: int, g: float | None
) -> None:
    """Raises ValueError or TypeError, which names the argument, if the operands do not fit together."""
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
    """Checks the operands, makes them contiguous and calls the backend's kernel."""
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


def _lattice_coupling_fake(call: Any) -> Tensor:
    """Returns the output of `_lattice_coupling_forward` without its values."""
    check_lattice(call.target, call.source, call.eps, call.faults, call.row, call.g)
    return torch.empty_like(call.target, memory_format=torch.contiguous_format)


# The eager kernel


def within(n: Tensor, good: Tensor | None, dtype: torch.dtype, faults: Tensor, row: int) -> Tensor:
    """Returns n (int64) where it is good and in the range of the lattice's dtype, else 0, and notes a fault."""
    fits = n.abs() <= limit(dtype)
    if good is not None:
        fits = fits & good
    faults[row, 0] |= (~fits).any()
    return torch.where(fits, n, 0)


def moved(n: Tensor, v: Tensor, undo: bool, dtype: torch.dtype, faults: Tensor, row: int) -> Tensor:
    """Returns n (int64) + rint(v), or minus with `undo`."""
    small = v.abs() < LARGEST_MOVE  # This is false for NaN.
    step = torch.where(small, v, 0.0).round().to(torch.int64)
    return within(n - step if undo else n + step, small, dtype, faults, row)


def coupled(call: Any) -> Tensor:
    """Returns the result of the coupling in a kernel's arguments, in int64."""
    v = call.source.double() * call.c
    if call.eps is not None:
        e = combined(call.eps, call.g, torch.float64)
        call.faults[call.row, 1] |= (~torch.isfinite(e)).any()
        v = v + e * call.b
    return moved(call.target.long(), v, call.undo, call.target.dtype, call.faults, call.row)


@eager(LATTICE_COUPLING)
def _lattice_coupling_eager(call: Any) -> None:
    """Fills `out`, and notes faults."""
    call.out.copy_(coupled(call))


register(LATTICE_COUPLING, _lattice_coupling_forward, _lattice_coupling_fake)
