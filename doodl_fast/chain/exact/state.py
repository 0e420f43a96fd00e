"""`LatticeState`: the integers of x and y and their information buffers, at one end of a chain in exact arithmetic."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arithmetic import to_latent
from .lattice import WORD_BITS
from .state_file import TENSORS, read_fields, write_fields


@dataclass(frozen=True, eq=False)
class LatticeState:
    """A pair of latents on the lattice of a chain in exact arithmetic, at one of its ends. `chain.state` makes it.

    It carries no gradient.

    Attributes:
        x: (B, C, ...) int32 or int64, in units of `units[0]`.
        y: The same for y, in units of `units[1]`.
        x_buffer: The information buffer of x, (words, B, C, ...) int32: 31 bits a word, the lowest first. It holds what
            the divisions of the mixing left over (arXiv 1502.03492).
        y_buffer: The same for y.
        end: "noise" or "image".
        latents_dtype: The dtype of the latents that the state was made from.
        units: The values of one unit of x and of one unit of y.
        fingerprint: A digest of the lattice (schedule, mix weight, width and solver). A chain refuses states of another
            lattice. The network, the prompt and the guidance scale are not in it: another prompt edits a picture.

    Example:
        state = chain.state(x0, end="image")
        noise = chain.inverse_state(state)
        assert chain.forward_state(noise).equals(state)  # bit for bit
    """

    x: Tensor
    y: Tensor
    x_buffer: Tensor
    y_buffer: Tensor
    end: str
    latents_dtype: torch.dtype
    units: tuple[float, float]
    fingerprint: str

    def __repr__(self) -> str:
        kind = f"{self.x.dtype}".removeprefix("torch.")
        return f"LatticeState({tuple(self.x.shape)} {kind}, end={self.end!r}, {len(self.x_buffer)} words)"

    def latents(self) -> tuple[Tensor, Tensor]:
        """x and y as new tensors (B, C, ...) of `latents_dtype`, rounded once."""
        x_unit, y_unit = self.units
        return to_latent(self.x, x_unit, self.latents_dtype), to_latent(self.y, y_unit, self.latents_dtype)

    def equals(self, other: LatticeState) -> bool:
        """Whether another state is the same, bit for bit, in everything that a chain goes on from, buffers included.

        Raises:
            TypeError: `other` is no LatticeState.
        """
        if not isinstance(other, LatticeState):
            raise TypeError(f"other: expected a LatticeState, got {type(other).__name__}")
        if any(getattr(self, name) != getattr(other, name) for name in ("end", "latents_dtype", "fingerprint")):
            return False
        if self.x.shape != other.x.shape:
            return False
        words = max(len(self.x_buffer), len(other.x_buffer))
        mine, others = self.with_words(words), other.with_words(words).to(self.x.device)
        return all(torch.equal(getattr(mine, name), getattr(others, name)) for name in TENSORS)

    def to(self, device: torch.device | str) -> LatticeState:
        """The state on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def tensors(self) -> list[Tensor]:
        """The list [x, y, x_buffer, y_buffer], as the arithmetic takes a state."""
        return [getattr(self, name) for name in TENSORS]

    def with_words(self, words: int) -> LatticeState:
        """The same state with buffers of at least that many words; those that are added are zero."""
        missing = words - len(self.x_buffer)
        if missing <= 0:
            return self
        zeros = self.x_buffer.new_zeros((missing, *self.x.shape))
        return replace(self, x_buffer=torch.cat([self.x_buffer, zeros]), y_buffer=torch.cat([self.y_buffer, zeros]))

    def bounds(self) -> tuple[int, int]:
        """Upper bounds of the integers in x's and in y's buffer. This synchronises with the device."""
        return _bound(self.x_buffer), _bound(self.y_buffer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state as a safetensors file, with everything but the tensors, and a checksum, as metadata.

        The file's size does not depend on the chain's number of steps, unless a buffer has grown.

        Args:
            path: The file, which is replaced if it is there.
        """
        write_fields(path, vars(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatticeState:
        """Reads a saved state, to the CPU.

        Args:
            path: The file that `save` wrote.

        Raises:
            ValueError: It is no such file, or it is damaged: truncated, changed in any bit that matters, or with
                tensors that are no state. The error says what is wrong.
            OSError: There is no such file, or it cannot be read.
        """
        return cls(**read_fields(path))


def _bound(buffer: Tensor) -> int:
    """An upper bound on the integers in a buffer, from the largest value of each word."""
    largest: list[int] = buffer.flatten(1).amax(1).tolist() if buffer.numel() else []
    for word in range(len(largest) - 1, -1, -1):
        if largest[word]:
            return ((largest[word] + 1) << (WORD_BITS * word)) - 1
    return 0


def state_of(
    tensors: Sequence[Tensor], end: str, latents_dtype: torch.dtype, units: tuple[float, float], fingerprint: str
) -> LatticeState:
    """Makes a state of the tensors [x, y, x's buffer, y's buffer]."""
    x, y, x_buffer, y_buffer = tensors
    return LatticeState(x, y, x_buffer, y_buffer, end, latents_dtype, units, fingerprint)


def check_state(state: Any, end: str, fingerprint: str) -> None:
    """Checks that a chain can go on from a state.

    Args:
        state: The state.
        end: The end that the chain is about to start from.
        fingerprint: The chain's own.

    Raises:
        TypeError: It is no LatticeState.
        ValueError: It is at the other end, or of another lattice.
    """
    if not isinstance(state, LatticeState):
        raise TypeError(f"state: expected a LatticeState, got {type(state).__name__}; use chain.state(x, y)")
    if state.fingerprint != fingerprint:
        raise ValueError(
            "state: it was made by a chain with another schedule, mix_weight, state_dtype or arithmetic, and would not "
            "come back to where it started; use the settings that it was made with, or start anew with "
            f"chain.state(*state.latents(), end={state.end!r})"
        )
    if state.end != end:
        other = "inverse_state" if state.end == "image" else "forward_state"
        raise ValueError(
            f"state: expected one at the {end}'s end, got one at the {state.end}'s; use chain.{other}(state)"
        )
