"""Fused operators on latents and for layers of frozen networks, each in eager PyTorch, in Triton and in C++ (or CUDA).

    from doodl_fast import ops
    x = ops.coupling(x, y, eps, a=0.9, b=-0.1, g=7.5)      # eps: the network's batched output, [uncond; cond]
    with ops.backend("eager"): ...                          # or the environment variable DOODL_FAST_BACKEND=eager

They are registered with PyTorch as `torch.ops.doodl_fast.*`, with fake implementations and gradients, so that
`torch.compile` handles them without a graph break. `signatures.py` lists them with their arguments and outputs.
"""

from __future__ import annotations

from .backends.registry import AUTO, NAMES, BackendUnavailable, backend, choice, has_kernel, resolve, why_not
from .coupling_mix_op import Mixing, coupling_mix, coupling_mix_vjp, mix, mix_inverse
from .coupling_op import coupling, coupling_inverse, coupling_vjp
from .gated_op import gated_activation, gated_activation_backward
from .group_norm_op import group_norm_silu, group_norm_silu_backward
from .latent_update_op import latent_update
from .lattice_coupling_op import lattice_coupling
from .lattice_mix_op import LatticeMixing, lattice_mix
from .matching import matches_torch
from .modulated_norm_op import modulated_norm, modulated_norm_backward
from .quick_gelu_op import quick_gelu, quick_gelu_backward
from .rotary_op import rotary_embedding, rotary_embedding_backward

__all__ = [
    "AUTO",
    "NAMES",
    "BackendUnavailable",
    "LatticeMixing",
    "Mixing",
    "backend",
    "choice",
    "coupling",
    "coupling_inverse",
    "coupling_mix",
    "coupling_mix_vjp",
    "coupling_vjp",
    "gated_activation",
    "gated_activation_backward",
    "group_norm_silu",
    "group_norm_silu_backward",
    "has_kernel",
    "latent_update",
    "lattice_coupling",
    "lattice_mix",
    "matches_torch",
    "mix",
    "mix_inverse",
    "modulated_norm",
    "modulated_norm_backward",
    "quick_gelu",
    "quick_gelu_backward",
    "resolve",
    "rotary_embedding",
    "rotary_embedding_backward",
    "why_not",
]
