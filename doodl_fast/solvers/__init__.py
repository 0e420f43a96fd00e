"""Solvers, one file for each: they turn a noise schedule into a list of couplings. See `DiffusionChain` in base.py."""

from __future__ import annotations

from .edict import edict_program

__all__ = ["edict_program"]
