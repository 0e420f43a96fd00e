"""Exact arithmetic on tensors: x and y as integers on a lattice (`lattice.py`), and the faults that it reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ... import ops
from ...ops.lattice_coupling_op import limit
from ...ops.layout import rounded
from ..arithmetic import Eps, Group
from ..host_reads import check_later
from ..program import Coupling, Program
from .lattice import Lattice, LatticeCoupling

DTYPES = {32: torch.int32, 64: torch.int64}


class Exact:
    """The arithmetic that holds x, y and their information buffers as integers; one object serves one pass.

    Undoing a coupling gives back the same bits if the network gives the same bits again.

    A state is [x, y, x's buffer, y's buffer]: integers (B, ...) and int32 (words, B, ...). Kernels note faults on the
    device, in a table with a row for every position in the program. `finish` reads it once.

    Args:
        lattice: The units and the width of the integers.
        program: The lattice's program, or its inverse.
        ends: Where the pass starts and where it ends, "noise" and "image" or the other way round.
        words: How many words a buffer has.
        latents_dtype: The dtype of the latents that come in and go out.
        state_dtype: The dtype of what the network is given.
    """

    tensors_per_value: ClassVar[int] = 2
    exact: ClassVar[bool] = True

    def __init__(
        self,
        lattice: Lattice,
        program: Program,
        ends: tuple[str, str],
        words: int,
        latents_dtype: torch.dtype,
        state_dtype: torch.dtype,
    ) -> None:
        self.lattice, self.program, self.ends, self.words = lattice, program, ends, words
        self.latents_dtype, self.state_dtype = latents_dtype, state_dtype
        self._faults: Tensor | None = None
        self._visited: list[Group | None] = []

    # What the protocol `Arithmetic` asks for

    def enter(self, *latents: Tensor) -> list[Tensor]:
        """Rounds latents to the lattice and gives them empty buffers. Latents out of range are noted as a fault."""
        dtype = DTYPES[self.lattice.width.bits]
        faults, row = self._row(latents[0], None)
        integers = []
        for latent, unit in zip(latents, self.lattice.units[self.ends[0]], strict=True):
            n = (latent.detach().double() / unit).round()
            fits = n.abs() <= limit(dtype)
            faults[row, 0] |= (~fits).any()
            integers.append(torch.where(fits, n, 0.0).to(dtype).contiguous())
        return [*integers, *(n.new_zeros((self.words, *n.shape), dtype=torch.int32) for n in integers)]

    def leave(self, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The latents of a state, rounded once to the caller's dtype."""
        units = self.lattice.units[self.ends[1]]
        return to_latent(state[0], units[0], self.latents_dtype), to_latent(state[1], units[1], self.latents_dtype)

    def source(self, state: Sequence[Tensor], coupling: Coupling) -> Tensor:
        """What the network is evaluated at: the values of the source's integers, in `state_dtype`."""
        return to_latent(state[coupling.source], _lattice(coupling).source_unit, self.state_dtype)

    def apply(self, group: Group, state: list[Tensor], eps: Eps | None) -> None:
        """Does a group's couplings."""
        lone = group.coupling if group.coupling is not None and not group.calls_network else None
        pair = (lone, None) if lone is not None else group.mixing
        self._do(group, state, None if lone is not None else group.coupling, pair, eps)

    def undo_mixing(self, group: Group, state: list[Tensor]) -> None:
        """Undoes a group's mixing, to the bit."""
        if group.mixing is not None:
            first, second = group.mixing
            self._do(group, state, None, (second.inverse(), first.inverse()), None)

    def undo_coupling(self, group: Group, state: list[Tensor], eps: Eps | None) -> None:
        """Undoes a group's coupling, to the bit; its mixing must be undone already."""
        if group.coupling is not None:
            undone = group.coupling.inverse()
            network = group.calls_network
            self._do(group, state, undone if network else None, None if network else (undone, None), eps)

    def _do(
        self,
        group: Group,
        state: list[Tensor],
        coupling: Coupling | None,
        pair: tuple[Coupling, Coupling | None] | None,
        eps: Eps | None,
    ) -> None:
        """Makes one pass over memory: a coupling that calls the network, one or two that do not, or both."""
        t, s = group.target, 1 - group.target
        faults, row = self._row(state[t], group)
        c, b, undo = 0.0, 0.0, False
        if coupling is not None:
            k = _lattice(coupling)
            c, b, undo = k.per_source, k.per_eps, k.undo
        value, g = (None, None) if eps is None else eps
        if pair is None:
            state[t] = ops.lattice_coupling(state[t], state[s], value, faults, row, c, b, g, undo)
            return
        first, second = pair
        k0 = _lattice(first)
        numbers = [k0.by, k0.over, k0.per_source]
        if second is not None:
            k1 = _lattice(second)
            numbers += [k1.by, k1.over, k1.per_source]
        mixing = ops.LatticeMixing(first.target == t, *numbers)  # type: ignore[arg-type]
        buffers = (state[2 + t], state[2 + s])
        state[t], state[s], state[2 + t], state[2 + s] = ops.lattice_mix(
            state[t], state[s], *buffers, value, faults, row, mixing, c, b, g, k0.undo
        )

    # Faults

    def _row(self, like: Tensor, group: Group | None) -> tuple[Tensor, int]:
        """The table of faults, and the row of a group in it: its end's position in the program, or 0 for the start."""
        if self._faults is None:
            self._faults = torch.zeros(len(self.program) + 1, 2, dtype=torch.int32, device=like.device)
        self._visited.append(group)
        return self._faults, 0 if group is None else group.end

    def finish(self) -> None:
        """Ends the pass, with one synchronisation.

        Raises:
            FloatingPointError: The network returned NaN or Inf.
            OverflowError: A value left the lattice's range. Of several faults the first one is raised.
        """
        if self._faults is not None:
            check_later(self._faults, self._check)

    def _check(self, table: list[float]) -> None:
        """Raises for the first fault of the table, whose rows of two numbers follow one another."""
        for group in self._visited:
            row = 2 * (0 if group is None else group.end)
            outside, infinite = table[row : row + 2]
            if infinite:
                raise FloatingPointError(
                    f"evaluator: NaN or Inf {_place(group)}; try the network in bf16 or fp32, a smaller guidance_scale "
                    "or latents nearer to unit variance"
                )
            if outside:
                raise OverflowError(self._overflow(group))

    def _overflow(self, group: Group | None) -> str:
        """The text of an OverflowError."""
        width = self.lattice.width.bits
        largest = limit(DTYPES[width])
        noise, image = (largest * min(map(abs, self.lattice.units[end])) for end in ("noise", "image"))
        return (
            f"x, y: out of the range of exact arithmetic (+-{noise:.4g} at the noise, +-{image:.4g} at the image) "
            f"{_place(group)}; look for latents or a network's output of unusual size, or use arithmetic="
            + ('"exact64"' if width == 32 else '"float"')
        )


def _place(group: Group | None) -> str:
    """Where in a run a group is, in words; None is the start."""
    if group is None:
        return "at the start"
    first = group.coupling
    if first is None or not first.calls_network:
        step = first.step if first is not None else group.mixing[0].step if group.mixing is not None else 0
        return f"in the mixing of step {step}"
    then = "" if group.mixing is None else " (or mixed right after)"
    return f"in step {first.step}, where {'xy'[first.target]} is updated at timestep {first.tag}{then}"


def to_latent(n: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
    """The latents that integers stand for, each rounded once to a floating dtype.

    The same integers give the same bits on every device.
    """
    return rounded(n.double() * unit, dtype)


def _lattice(coupling: Coupling) -> LatticeCoupling:
    """A coupling of a lattice's program, with its type."""
    assert isinstance(coupling, LatticeCoupling)
    return coupling
