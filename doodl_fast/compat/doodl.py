"""The public names of the reference's module `doodl`, for instance `from doodl_fast.compat.doodl import gen`."""

from .conditioning import get_generic_cond_fn
from .gen import gen
from .gen_modes import GenResult
from .layers import MixingLayer, SteppingLayer
from .losses import (
    aesthetic_loss_fn,
    aesthetic_score,
    clip_loss_fn,
    fgvc_loss_fn,
    get_aesthetic_model,
    spherical_dist_loss,
    symmetry_loss_fn,
)
from .schedule import forward_step, get_alpha_and_beta, reverse_step
from .views import MakeCutouts

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
