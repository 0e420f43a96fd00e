"""What survives between the two directions of an exact chain: the integers of x and y, and their buffers."""

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
    """A pair of latents on the lattice of an exact chain, at one of its ends; made by `chain.state`.

        state = chain.state(x0, end="image")
        noise = chain.inverse_state(state)
        assert chain.forward_state(noise).equals(state)     # bit for bit

    x, y: (B, ...) int32 or int64, in units of `units`. x_buffer, y_buffer: (words, B, ...) int32, 31 bits a word, the
    lowest first: what the mixing's divisions left over (arXiv 1502.03492). end: "noise" or "image". latents_dtype: of
    the latents that it was made from. fingerprint: of the lattice (schedule, mix weight, width, solver); a chain
    refuses states of another one. The network, prompt and guidance scale are not in it: another prompt edits a picture.
    It carries no gradient.
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
        """x and y as new tensors of `latents_dtype`, rounded once."""
        x_unit, y_unit = self.units
        return to_latent(self.x, x_unit, self.latents_dtype), to_latent(self.y, y_unit, self.latents_dtype)

    def equals(self, other: LatticeState) -> bool:
        """Whether everything that a chain goes on from is the same, bit for bit, buffers included."""
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
        """[x, y, x_buffer, y_buffer]."""
        return [getattr(self, name) for name in TENSORS]

    def with_words(self, words: int) -> LatticeState:
        """The same with buffers of at least that many words; those that are added are zero."""
        missing = words - len(self.x_buffer)
        if missing <= 0:
            return self
        zeros = self.x_buffer.new_zeros((missing, *self.x.shape))
        return replace(self, x_buffer=torch.cat([self.x_buffer, zeros]), y_buffer=torch.cat([self.y_buffer, zeros]))

    def bounds(self) -> tuple[int, int]:
        """Upper bounds of the buffers' integers (synchronises)."""
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
    """An upper bound on a buffer's integers, from the largest of each word."""
    largest: list[int] = buffer.flatten(1).amax(1).tolist() if buffer.numel() else []
    for word in range(len(largest) - 1, -1, -1):
        if largest[word]:
            return ((largest[word] + 1) << (WORD_BITS * word)) - 1
    return 0


def state_of(
    tensors: Sequence[Tensor], end: str, latents_dtype: torch.dtype, units: tuple[float, float], fingerprint: str
) -> LatticeState:
    """A state of [x, y, x's buffer, y's buffer]."""
    x, y, x_buffer, y_buffer = tensors
    return LatticeState(x, y, x_buffer, y_buffer, end, latents_dtype, units, fingerprint)


def check_state(state: Any, end: str, fingerprint: str) -> None:
    """Raises TypeError or ValueError unless a chain can go on from a state."""
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
