"""What survives between the two directions of an exact chain: the integers of x and y, and their buffers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ops.lattice_coupling_op import limit
from .arithmetic import DTYPES, to_latent
from .lattice import WORD_BITS

FORMAT, VERSION = "doodl_fast.LatticeState", "1"
ENDS = ("noise", "image")
LATENT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
TENSORS = ("x", "y", "x_buffer", "y_buffer")


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
        """Writes it as safetensors, everything but the tensors as metadata. The file's size does not depend on T."""
        from safetensors.torch import save_file

        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "end": self.end,
            "latents_dtype": next(name for name, dtype in LATENT_DTYPES.items() if dtype == self.latents_dtype),
            "units": " ".join(unit.hex() for unit in self.units),
            "fingerprint": self.fingerprint,
        }
        tensors = {name: getattr(self, name).detach().cpu().contiguous().clone() for name in TENSORS}
        save_file(tensors, os.fspath(path), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatticeState:
        """A saved state, on the CPU. Raises ValueError for a file that is none, OSError for one that cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), "pt") as file:  # type: ignore[no-untyped-call]
                metadata: dict[str, str] = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except SafetensorError as error:
            raise ValueError(f"path: {os.fspath(path)} is not a safetensors file ({error})") from error
        said = metadata.get("format"), metadata.get("version")
        if said != (FORMAT, VERSION):
            raise ValueError(f"path: expected a {FORMAT} of version {VERSION}, got {said[0]} of version {said[1]}")
        try:
            _check(found)
            x_unit, y_unit = (float.fromhex(unit) for unit in metadata["units"].split())
            end = metadata["end"]
            if end not in ENDS:
                raise ValueError(f"end: expected one of {ENDS}, got {end!r}")
            dtype = LATENT_DTYPES[metadata["latents_dtype"]]
            return cls(
                **found, end=end, latents_dtype=dtype, units=(x_unit, y_unit), fingerprint=metadata["fingerprint"]
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"path: {os.fspath(path)} is a damaged LatticeState: {error}") from error


def _check(found: dict[str, Tensor]) -> None:
    """Raises ValueError unless these are the tensors of a state within the range."""
    if set(found) != set(TENSORS):
        raise ValueError(f"expected the tensors {', '.join(TENSORS)}, got {', '.join(sorted(found))}")
    x, y, x_buffer, y_buffer = (found[name] for name in TENSORS)
    if x.dtype not in DTYPES.values() or y.dtype != x.dtype or y.shape != x.shape:
        raise ValueError(f"expected x and y of int32 or int64 alike, got {x.dtype} {x.shape} and {y.dtype} {y.shape}")
    if any(bool((n.abs() > limit(n.dtype)).any()) or bool((n == torch.iinfo(n.dtype).min).any()) for n in (x, y)):
        raise ValueError("expected x and y in the lattice's range")
    for buffer in (x_buffer, y_buffer):
        if buffer.dtype != torch.int32 or buffer.shape != (len(x_buffer), *x.shape) or bool((buffer < 0).any()):
            raise ValueError(f"expected buffers of int32 >= 0, (words, *{tuple(x.shape)}), got {tuple(buffer.shape)}")


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
