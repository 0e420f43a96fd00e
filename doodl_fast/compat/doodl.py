"""The reference's names: `from doodl_fast.compat.doodl import gen, SteppingLayer, MixingLayer`, for instance."""

from .conditioning import get_generic_cond_fn
from .gen import gen
from .gen_modes import GenResult
from .layers import MixingLayer, SteppingLayer
from .losses import (
    MakeCutouts,
    aesthetic_loss_fn,
    aesthetic_score,
    clip_loss_fn,
    fgvc_loss_fn,
    get_aesthetic_model,
    spherical_dist_loss,
    symmetry_loss_fn,
)
from .schedule import forward_step, get_alpha_and_beta, reverse_step

__all__ = [
    "GenResult",
    "MakeCutouts",
    "MixingLayer",
    "SteppingLayer",
    "aesthetic_loss_fn",
    "aesthetic_score",
    "clip_loss_fn",
    "fgvc_loss_fn",
    "forward_step",
    "gen",
    "get_aesthetic_model",
    "get_alpha_and_beta",
    "get_generic_cond_fn",
    "reverse_step",
    "spherical_dist_loss",
    "symmetry_loss_fn",
]
