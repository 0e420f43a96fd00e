"""Chains: programs of reversible couplings that run forwards and backwards, and their gradients.

This package knows nothing of diffusion. `program.py` describes what a solver does, `run.py` carries it out on tensors,
`autograd.py` makes one run a node of PyTorch's autograd graph, and `chain.py` is the object that users call.
"""

from __future__ import annotations

from .chain import Chain
from .program import Coupling, Program

__all__ = ["Chain", "Coupling", "Program"]
