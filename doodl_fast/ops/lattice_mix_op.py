"""A lattice coupling and the mixing after it in one pass, which can be undone exactly; and the mixing alone.

EDICT's mixing (arXiv 2211.12446) multiplies: `first <- p first + (1-p) second`, then the other way round. On a lattice
p is a fraction by / over. What the division leaves over is kept in an information buffer, an integer for each element
(Maclaurin, Duvenaud and Adams, arXiv 1502.03492). For an integer n and its buffer m >= 0, one multiplication M is

    u = m mod by ;   m = m div by ;   n, v = divmod(n by + u, over) ;   m = m over + v            (floor division)

This is a bijection on (n, m): the same lines with by and over exchanged undo it. n is off by less than one unit, while
multiplying after the division would make an error of up to `over` units. m grows by log2(over / by) bits. It is stored
in words of 31 bits, in int32, the lowest word first: (words, B, ...). How many words are enough is known before a run
(`doodl_fast.chain.exact.lattice.words_needed`); the op drops whatever does not fit into the last word.

With t the target of the coupling, s its source, and `.` a multiplication in float64:

    t by `lattice_coupling` (c, b, eps, g)
    target first:  t = M0 t ;  t = t + rint(c0.s) ;  s = M1 s ;  s = s + rint(c1.t)        source first: t, s exchanged
    undo:          the coupling subtracts; then each pair is undone, in the order given:  t = t - rint(c0.s) ;  t = M0 t

With `undo`, the given factors must be those that undo; `LatticeMixing.inverse` exchanges by and over, and the order.
One pass of an inverse program therefore undoes a coupling, and then the mixing of the step before it. Faults, range,
shapes and layouts are those of `lattice_coupling`. The range is checked after every line that has a `rint`, and with
`undo` after M as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.registry import eager, select
from .lattice_coupling_op import check_lattice, coupled, moved, within
from .registration import register, registered
from .signatures import LATTICE_MIX
from .transforms import is_plain, refuse_transforms

LARGEST_FACTOR = 10000
WORD_BITS = 31
_MASK = (1 << WORD_BITS) - 1


class LatticeMixing(NamedTuple):
    """Two lattice couplings without a network, in the order in which they are done or undone.

    Attributes:
        target_first: Whether the first one changes t, the target of the coupling before it.
        by0: The numerator of the first one's factor, from 1 to 10000.
        over0: The denominator of the first one's factor, from 1 to 10000.
        c0: Units of the value that the first one changes per unit of the other value.
        by1: As by0, for the second one.
        over1: As over0, for the second one.
        c1: As c0, for the second one.
    """

    target_first: bool
    by0: int = 1
    over0: int = 1
    c0: float = 0.0
    by1: int = 1
    over1: int = 1
    c1: float = 0.0

    def inverse(self) -> LatticeMixing:
        """Returns the mixing that undoes this one, if `undo` is changed as well."""
        return LatticeMixing(not self.target_first, self.over1, self.by1, self.c1, self.over0, self.by0, self.c0)


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def lattice_mix(
    target: Tensor,
    source: Tensor,
    target_buffer: Tensor,
    source_buffer: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    mixing: LatticeMixing,
    c: float = 0.0,
    b: float = 0.0,
    g: float | None = None,
    undo: bool = False,
) -> Four:
    """Computes a lattice coupling and the mixing after it. Without eps, and with c = 0, it is the mixing alone.

    Args:
        target: As in `lattice_coupling`.
        source: As in `lattice_coupling`.
        target_buffer: The information buffer of target, (words, B, ...) of int32, on the same device.
        source_buffer: The information buffer of source, of the same shape.
        eps: As in `lattice_coupling`.
        faults: As in `lattice_coupling`.
        row: As in `lattice_coupling`.
        mixing: The mixing, or with `undo` the inverse of the one that is to be undone.
        c: As in `lattice_coupling`.
        b: As in `lattice_coupling`.
        g: As in `lattice_coupling`.
        undo: Whether to undo an earlier coupling, and then an earlier mixing.

    Returns:
        New contiguous tensors: target, source, target_buffer and source_buffer.

    Raises:
        ValueError: Shapes, devices or numbers do not fit.
        TypeError: A dtype does not fit.
        RuntimeError: A derivative or a batched call is asked for.
    """
    if is_plain(target, source, target_buffer, source_buffer, eps, faults):
        return _forward(target, source, target_buffer, source_buffer, eps, faults, row, *mixing, c, b, g, undo)
    refuse_transforms("lattice_mix", eps)
    four: Four = registered.lattice_mix(
        target, source, target_buffer, source_buffer, eps, faults, row, *mixing, c, b, g, undo
    )
    return four


def _check_buffers(target: Tensor, target_buffer: Tensor, source_buffer: Tensor, mixing: LatticeMixing) -> None:
    """Raises ValueError, which names the argument, if the buffers or the factors do not fit."""
    words = target_buffer.shape[0] if target_buffer.ndim else 0
    for name, buffer in (("target_buffer", target_buffer), ("source_buffer", source_buffer)):
        if buffer.dtype != torch.int32 or words < 1 or buffer.shape != (words, *target.shape):
            expected = f"int32 of shape (words, *{tuple(target.shape)})"
            raise ValueError(f"{name}: expected {expected}, got {buffer.dtype} of {tuple(buffer.shape)}")
        if buffer.device != target.device:
            raise ValueError(f"{name}: expected the target's device {target.device}, got {buffer.device}")
    for factor in (mixing.by0, mixing.over0, mixing.by1, mixing.over1):
        if not 1 <= factor <= LARGEST_FACTOR:
            raise ValueError(f"mixing: expected by and over from 1 to {LARGEST_FACTOR}, got {factor}")


def _forward(
    target: Tensor,
    source: Tensor,
    target_buffer: Tensor,
    source_buffer: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    *numbers: Any,
) -> Four:
    """Checks the operands, makes them contiguous and calls the kernel. numbers: the mixing, then c, b, g and undo."""
    check_lattice(target, source, eps, faults, row, numbers[-2])
    _check_buffers(target, target_buffer, source_buffer, LatticeMixing(*numbers[:7]))
    inputs = (target, source, target_buffer, source_buffer)
    outs = _empty(*inputs)
    if target.numel():
        select("lattice_mix", target)(
            *outs,
            *(tensor.contiguous() for tensor in inputs),
            None if eps is None else eps.contiguous(),
            *(faults, row, *numbers),
        )
    return outs


def _fake(call: Any) -> Four:
    """Returns the outputs of `_forward` without their values."""
    check_lattice(call.target, call.source, call.eps, call.faults, call.row, call.g)
    return _empty(call.target, call.source, call.target_buffer, call.source_buffer)


def _empty(*like: Tensor) -> Four:
    """Returns four uninitialised contiguous tensors like those that are given."""
    first, second, third, fourth = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in like)
    return first, second, third, fourth


# The eager kernel


def _scaled(n: Tensor, buffer: Tensor, out: Tensor, by: int, over: int) -> Tensor:
    """Multiplies n (int64) by the fraction by / over. Returns the product, and writes the new buffer into `out`."""
    rest = torch.zeros_like(n)
    for word, quotient in zip(reversed(buffer.unbind()), reversed(out.unbind()), strict=True):
        part = (rest << WORD_BITS) + word
        quotient.copy_(part // by)
        rest = part % by
    whole = n * by + rest
    carry = whole % over
    for word in out.unbind():
        part = word.long() * over + carry
        word.copy_(part & _MASK)
        carry = part >> WORD_BITS
    return torch.div(whole, over, rounding_mode="floor")


@eager(LATTICE_MIX)
def _lattice_mix_eager(call: Any) -> None:
    """Fills the four outputs, and notes faults."""
    dtype, faults, row = call.target.dtype, call.faults, call.row
    values = [coupled(call), call.source.long()]
    buffers = [(call.target_buffer, call.out_target_buffer), (call.source_buffer, call.out_source_buffer)]
    stages = ((call.by0, call.over0, call.c0), (call.by1, call.over1, call.c1))
    for which, (by, over, c) in zip((0, 1) if call.target_first else (1, 0), stages, strict=True):
        n, v = values[which], values[1 - which].double() * c
        if call.undo:
            n = moved(n, v, True, dtype, faults, row)
            n = within(_scaled(n, *buffers[which], by, over), None, dtype, faults, row)
        else:
            n = moved(_scaled(n, *buffers[which], by, over), v, False, dtype, faults, row)
        values[which] = n
    call.out_target.copy_(values[0])
    call.out_source.copy_(values[1])


register(LATTICE_MIX, _forward, _fake)
