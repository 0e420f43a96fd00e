"""A lattice coupling and the mixing after it in one pass, exactly undone; and the mixing alone.

EDICT's mixing (arXiv 2211.12446) multiplies: `first <- p first + (1-p) second`, then the other way. On a lattice p is a
fraction by / over, and what the division leaves over goes into an information buffer, an integer beside each element
(Maclaurin, Duvenaud and Adams, arXiv 1502.03492). For an integer n and its buffer m >= 0 one multiplication is

    u = m mod by ;   m = m div by ;   n, v = divmod(n by + u, over) ;   m = m over + v            (floor division)

a bijection on (n, m): the same lines with by and over exchanged undo it. n is off by less than one unit (multiplying
after the division instead would cost up to `over` units), and m grows by log2(over / by) bits. It is held in words of
31 bits, int32, the lowest first: (words, B, ...). That they suffice is known before a run, from
`doodl_fast.chain.exact.lattice.words_needed`; an op drops what does not fit into the last word, which then is 0.

With t the coupling's target, s its source, "." a rounding of float64 and M the multiplication above:

    t by `lattice_coupling` (c, b, eps, g)
    target first:  t = M0 t ;  t = t + rint(c0.s) ;  s = M1 s ;  s = s + rint(c1.t)        source first: t, s exchanged
    undo:          the coupling subtracts; each pair is undone, in the order given:  t = t - rint(c0.s) ;  t = M0 t

With undo the factors given must be those that undo: `LatticeMixing.inverse` exchanges by and over, and the order. So a
fused pass of an inverse program undoes a coupling, then the mixing of the step before. Faults, range, shapes and
layouts as in `lattice_coupling`; the range is checked after every line that has a `rint`, and after M when undoing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.registry import eager, select
from .lattice_coupling_op import check_lattice, coupled, moved, within
from .transforms import is_plain, refuse_transforms

LARGEST_FACTOR = 10000
WORD_BITS = 31
_MASK = (1 << WORD_BITS) - 1


class LatticeMixing(NamedTuple):
    """Two network-free lattice couplings, in the order in which they are done or undone.

    target_first: whether the first changes t, the target of the coupling before it. by, over: ints from 1 to 10000; c:
    units of the changed value per unit of the other.
    """

    target_first: bool
    by0: int = 1
    over0: int = 1
    c0: float = 0.0
    by1: int = 1
    over1: int = 1
    c1: float = 0.0

    def inverse(self) -> LatticeMixing:
        """What undoes it, with `undo` exchanged."""
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
    """`lattice_coupling`, then the mixing: new (target, source, target_buffer, source_buffer).

    target_buffer, source_buffer: (words, B, ...) int32. With eps = None and c = 0 it is the mixing alone.
    Raises ValueError or TypeError, naming the argument, and RuntimeError where a derivative is asked for.
    """
    if is_plain(target, source, target_buffer, source_buffer, eps, faults):
        return _forward(target, source, target_buffer, source_buffer, eps, faults, row, mixing, c, b, g, undo)
    refuse_transforms("lattice_mix", eps)
    four: Four = torch.ops.doodl_fast.lattice_mix(
        target, source, target_buffer, source_buffer, eps, faults, row, *mixing, c, b, g, undo
    )
    return four


def _check_buffers(target: Tensor, target_buffer: Tensor, source_buffer: Tensor, mixing: LatticeMixing) -> None:
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
    mixing: LatticeMixing,
    c: float,
    b: float,
    g: float | None,
    undo: bool,
) -> Four:
    check_lattice(target, source, eps, faults, row, g)
    _check_buffers(target, target_buffer, source_buffer, mixing)
    inputs = (target, source, target_buffer, source_buffer)
    outs = _empty(*inputs)
    if target.numel():
        select("lattice_mix", target)(
            *outs,
            *(tensor.contiguous() for tensor in inputs),
            None if eps is None else eps.contiguous(),
            faults,
            row,
            *mixing,
            c,
            b,
            g,
            undo,
        )
    return outs


def _empty(*like: Tensor) -> Any:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like)


# The reference kernel


def _scaled(n: Tensor, buffer: Tensor, out: Tensor, by: int, over: int) -> Tensor:
    """The multiplication M of n (int64) and a buffer, which goes to `out`."""
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


@eager
def _lattice_mix(
    out_target: Tensor,
    out_source: Tensor,
    out_target_buffer: Tensor,
    out_source_buffer: Tensor,
    target: Tensor,
    source: Tensor,
    target_buffer: Tensor,
    source_buffer: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    *rest: Any,
) -> None:
    mixing, (c, b, g, undo) = LatticeMixing(*rest[:7]), rest[7:]
    dtype = target.dtype
    values = [coupled(target, source, eps, faults, row, c, b, g, undo), source.long()]
    buffers = [(target_buffer, out_target_buffer), (source_buffer, out_source_buffer)]
    order = (0, 1) if mixing.target_first else (1, 0)
    for which, by, over, factor in zip(order, mixing[1::3], mixing[2::3], mixing[3::3], strict=True):
        n, v = values[which], values[1 - which].double() * factor
        if undo:
            n = moved(n, v, True, dtype, faults, row)
            n = within(_scaled(n, *buffers[which], by, over), None, dtype, faults, row)
        else:
            n = moved(_scaled(n, *buffers[which], by, over), v, False, dtype, faults, row)
        values[which] = n
    out_target.copy_(values[0])
    out_source.copy_(values[1])


# Registration


@torch.library.custom_op(
    "doodl_fast::lattice_mix",
    mutates_args=("faults",),
    schema="(Tensor target, Tensor source, Tensor target_buffer, Tensor source_buffer, Tensor? eps, Tensor(a!) faults, "
    "int row, bool target_first, int by0, int over0, float c0, int by1, int over1, float c1, float c, float b, "
    "float? g, bool undo) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _lattice_mix_op(
    target: Tensor,
    source: Tensor,
    target_buffer: Tensor,
    source_buffer: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    target_first: bool,
    *rest: Any,
) -> Four:
    mixing = LatticeMixing(target_first, *rest[:6])
    return _forward(target, source, target_buffer, source_buffer, eps, faults, row, mixing, *rest[6:])


@_lattice_mix_op.register_fake
def _(
    target: Tensor, source: Tensor, target_buffer: Tensor, source_buffer: Tensor, eps: Tensor | None, *rest: Any
) -> Four:
    faults, row, *numbers = rest
    check_lattice(target, source, eps, faults, row, numbers[-2])
    four: Four = _empty(target, source, target_buffer, source_buffer)
    return four
