"""How couplings are applied, undone and transposed, and which of them are done in one pass over memory.

A coupling that calls the network and the two network-free couplings after it (EDICT's mixing; in an inverse program the
mixing of the step before) become one pass, as do two network-free couplings alone. Solvers know nothing of this: any
program is grouped wherever the pattern occurs. `Floats` does the groups in floating point, by the fused operators.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from .program import Coupling, Program


class Eps(NamedTuple):
    """What a network returned: eps itself, or [uncond; cond] with the guidance scale g that combines them.

    Attributes:
        value: A tensor of the latents' shape (B, C, ...), or (2B, C, ...) with g, in the network's dtype.
        g: The guidance scale, or None.
    """

    value: Tensor
    g: float | None = None

    def detach(self) -> Eps:
        """The same without its graph."""
        return Eps(self.value.detach(), self.g)


@dataclass(frozen=True, slots=True)
class Group:
    """Couplings that are done in one pass.

    Attributes:
        coupling: What is done first, or None.
        mixing: The two network-free couplings that are done after it, or None. One of the two is not None.
        end: How many couplings of the program are done once the group is.
    """

    coupling: Coupling | None
    mixing: tuple[Coupling, Coupling] | None
    end: int

    @property
    def target(self) -> int:
        """The index of the value that the coupling changes, or of the one that is mixed first."""
        if self.coupling is not None:
            return self.coupling.target
        assert self.mixing is not None
        return self.mixing[0].target

    @property
    def source(self) -> int:
        """The index of the value that the coupling reads, or of the one that is mixed second."""
        if self.coupling is not None:
            return self.coupling.source
        assert self.mixing is not None
        return self.mixing[0].source

    @property
    def calls_network(self) -> bool:
        """Whether the group's coupling evaluates the network."""
        return self.coupling is not None and self.coupling.calls_network

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """(a, c, b) of the coupling; without one, those of the identity."""
        return (1.0, 0.0, 0.0) if self.coupling is None else (self.coupling.a, self.coupling.c, self.coupling.b)

    def pair(self) -> ops.Mixing:
        """The mixing in the form that the fused operators take."""
        assert self.mixing is not None
        first, second = self.mixing
        return ops.Mixing(first.target == self.target, first.a, first.c, second.a, second.c)

    def weights(self) -> tuple[float, float]:
        """The weights with which the cotangents of target and source, after the mixing, add up to the cotangent of what
        the coupling made, before the mixing."""
        if self.mixing is None:
            return 1.0, 0.0
        m = self.pair()
        return (m.a0, m.a0 * m.c1) if m.target_first else (m.a1 + m.c0 * m.c1, m.c0)


def group(program: Program, boundaries: Collection[int] = ()) -> tuple[Group, ...]:
    """Divides a program into passes.

    Args:
        program: The couplings.
        boundaries: Numbers of couplings after which the state must exist, so that no pass may go beyond them.
    """
    groups: list[Group] = []
    done = 0
    while done < len(program):
        first = program[done]
        start = done + first.calls_network
        pair = program[start : start + 2]
        mixes = len(pair) == 2 and not pair[0].calls_network and not pair[1].calls_network
        mixes = mixes and (pair[0].target, pair[0].source) == (pair[1].source, pair[1].target)
        mixes = mixes and {pair[0].target, pair[0].source} == {first.target, first.source}
        if mixes and not any(position in boundaries for position in range(done + 1, start + 2)):
            done = start + 2
            groups.append(Group(first if first.calls_network else None, (pair[0], pair[1]), done))
        else:
            done += 1
            groups.append(Group(first, None, done))
    return tuple(groups)


class Arithmetic(Protocol):
    """How the latents are held between couplings, and how groups are done and undone on them.

    There is one object for each pass over a program.

    A state is a list of tensors: the values of the program first, then, if `tensors_per_value` is 2, what else belongs
    to each of them. Its entries are replaced, but the tensors are never changed, because the engine stores them.
    """

    tensors_per_value: ClassVar[int]
    exact: ClassVar[bool]
    """Whether undoing gives back the same bits, given the same eps."""

    def enter(self, *latents: Tensor) -> list[Tensor]:
        """The state of the caller's latents, in tensors of its own."""
        ...

    def leave(self, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The latents of a state, in the caller's dtype. They share no memory with anything that is kept."""
        ...

    def source(self, state: Sequence[Tensor], coupling: Coupling) -> Tensor:
        """The tensor that a coupling's function is evaluated at."""
        ...

    def apply(self, group: Group, state: list[Tensor], eps: Eps | None) -> None:
        """Does a group's couplings."""
        ...

    def undo_mixing(self, group: Group, state: list[Tensor]) -> None:
        """Undoes what a group does after its coupling."""
        ...

    def undo_coupling(self, group: Group, state: list[Tensor], eps: Eps | None) -> None:
        """Undoes a group's coupling; its mixing must be undone already."""
        ...

    def finish(self) -> None:
        """Ends the pass. Raises for what went wrong in it and could not be known earlier without synchronising."""
        ...


@dataclass(frozen=True)
class Floats:
    """Holds the latents as floating-point tensors, in which undoing is exact up to rounding.

    Attributes:
        latents_dtype: The dtype of the caller's latents.
        state_dtype: The dtype that they are held in.
    """

    latents_dtype: torch.dtype
    state_dtype: torch.dtype
    tensors_per_value: ClassVar[int] = 1
    exact: ClassVar[bool] = False

    def enter(self, *latents: Tensor) -> list[Tensor]:
        return [latent.to(self.state_dtype, copy=True) for latent in latents]

    def leave(self, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(latent.to(self.latents_dtype, copy=True) for latent in state)

    def source(self, state: Sequence[Tensor], coupling: Coupling) -> Tensor:
        return state[coupling.source]

    def apply(self, group: Group, state: list[Tensor], eps: Eps | None) -> None:
        t, s = group.target, group.source
        a, c, b = group.coefficients
        value, g = (None, None) if eps is None else eps
        if group.mixing is not None:
            state[t], state[s] = ops.coupling_mix(state[t], state[s], value, group.pair(), a, c, b, g)
        else:
            state[t] = ops.coupling(state[t], state[s], value, a, c, b, g)

    def undo_mixing(self, group: Group, state: list[Tensor]) -> None:
        if group.mixing is not None:
            t, s = group.target, group.source
            state[t], state[s] = ops.mix_inverse(state[t], state[s], group.pair())

    def undo_coupling(self, group: Group, state: list[Tensor], eps: Eps | None) -> None:
        if group.coupling is not None:
            t, s = group.target, group.source
            value, g = (None, None) if eps is None else eps
            state[t] = ops.coupling_inverse(state[t], state[s], value, *group.coefficients, g)

    def finish(self) -> None:
        """Does nothing: NaN and Inf are found by the run itself."""


def transpose(group: Group, cotangents: list[Tensor], eps: Eps | None, scale: Tensor | None) -> Tensor | None:
    """Pulls the cotangents back through a group, except for what comes through the network.

    Args:
        group: The group.
        cotangents: Those of the latents after the group. The list's entries are replaced by those before it.
        eps: The network's output, if a cotangent of it is wanted, else None.
        scale: A 0-dim tensor that this cotangent is multiplied by, or None.

    Returns:
        The cotangent of the network's output, in its dtype and shape; None without eps.
    """
    t, s = group.target, group.source
    a, c, b = group.coefficients
    dtype, g = (None, None) if eps is None else (eps.value.dtype, eps.g)
    to_source: Tensor | None
    if group.mixing is not None:
        cotangents[t], cotangents[s], to_eps = ops.coupling_mix_vjp(
            cotangents[t], cotangents[s], group.pair(), a, c, b, g, scale, dtype
        )
        return to_eps
    cotangents[t], to_source, to_eps = ops.coupling_vjp(cotangents[t], a, c, b, g, scale, dtype, c != 0)
    if to_source is not None:
        cotangents[s] = cotangents[s] + to_source
    return to_eps


def network_power(group: Group, cotangents: list[Tensor]) -> Tensor:
    """The power of two just below a bound on the cotangent that the network will get; see `power_of_two`.

    The largest magnitude itself is not known beforehand, because one fused pass makes the cotangent and scales it. Each
    operation here is a launch on a GPU for one number, in every evaluation, so there are few. Where the bound is zero
    or not finite the result is the smallest or the largest power of two that has a reciprocal: it makes nothing finite
    of what is not, and zero of what is zero.
    """
    both = zip((cotangents[group.target], cotangents[group.source]), group.weights(), strict=True)
    used = [(z, abs(weight * group.coefficients[2])) for z, weight in both if weight and z.numel()]
    if not used:
        return cotangents[0].new_ones(())
    bound, *others = torch._foreach_norm([z for z, _ in used], torch.inf)
    bound = bound * used[0][1]
    if others:
        bound = torch.add(bound, others[0], alpha=used[1][1])
    smallest = torch.finfo(bound.dtype).tiny
    return _exponent(bound).clamp_(smallest, 1 / smallest)


def power_of_two(cotangent: Tensor) -> Tensor:
    """The power of two just below the largest magnitude, as a 0-dim tensor on the device.

    It is 1 where there is none, because all elements are zero or one is not finite. A VJP is linear in its cotangent,
    so scaling by a power of two is exact, and keeps an fp16 network's backward pass in range whatever the loss's scale
    or the depth. Masking the bits of the exponent is exact for every number and needs no synchronisation.
    """
    if cotangent.numel() == 0:
        return cotangent.new_ones(())
    power = _exponent(torch.linalg.vector_norm(cotangent, torch.inf))
    return torch.where((power > 0) & (power < torch.inf), power, 1)


def _exponent(magnitude: Tensor) -> Tensor:
    """The power of two just below a magnitude; 0 for zero and what is subnormal, inf for what is not finite."""
    integers, exponent = (torch.int64, 0x7FF << 52) if magnitude.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    return (magnitude.view(integers) & exponent).view(magnitude.dtype)
