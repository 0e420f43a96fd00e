"""Solvers: a noise schedule in, a list of couplings out. One file a solver, no tensors."""

from __future__ import annotations

from .edict import edict_program

__all__ = ["edict_program"]
