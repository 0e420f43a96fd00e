"""Takes states of exact arithmetic through a chain, without losing a bit in either direction."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factory import RunFactory
from ..latents import check_latents
from ..program import invert
from .lattice import Lattice, words_needed
from .state import LatticeState, check_state, state_of
from .state_file import ENDS


def new_state(runs: RunFactory, x: Tensor, y: Tensor | None, end: str) -> LatticeState:
    """Rounds latents to the lattice and gives them empty buffers. See `Chain.state`."""
    if end not in ENDS:
        raise ValueError(f"end: expected one of {', '.join(map(repr, ENDS))}, got {end!r}")
    lattice = _require_lattice(runs)
    check_latents(x, y)
    with torch.no_grad():
        work = runs.new_run(x, inverse=end == "image").new_arithmetic()
        tensors = work.enter(x, x if y is None else y)
        work.finish()
    return state_of(tensors, end, x.dtype, lattice.units[end], _fingerprint(runs, lattice))


def transport(runs: RunFactory, state: LatticeState, inverse: bool) -> LatticeState:
    """Takes a state to the other end of the chain. See `Chain.forward_state` and `Chain.inverse_state`."""
    lattice = _require_lattice(runs)
    start, end = ENDS[::-1] if inverse else ENDS
    check_state(state, start, _fingerprint(runs, lattice))
    words = words_needed(invert(runs.program) if inverse else runs.program, state.bounds())
    run = runs.new_run(state.x.new_empty(0, dtype=state.latents_dtype), inverse)
    with run.evaluator.running(), torch.no_grad():
        work = run.new_arithmetic()
        tensors = state.with_words(words).tensors()
        run.forward(work, tensors, run.evaluator.tensors())
        work.finish()
    return state_of(tensors, end, state.latents_dtype, lattice.units[end], state.fingerprint)


def _require_lattice(runs: RunFactory) -> Lattice:
    """The chain's lattice. Raises ValueError for a chain in floating point, which has none."""
    if runs.lattice is None:
        raise ValueError(
            'arithmetic: states need exact arithmetic, and this chain has "float"; make it with arithmetic="exact"'
        )
    return runs.lattice


def _fingerprint(runs: RunFactory, lattice: Lattice) -> str:
    """Identifies everything, but the network and its conditions, that a state's way through the chain depends on."""
    return f"{lattice.fingerprint} {runs.state_dtype or torch.float64}"
