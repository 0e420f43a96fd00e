"""The reference's names: `from doodl_fast.compat.doodl import SteppingLayer, MixingLayer`, for instance."""

from .layers import MixingLayer, SteppingLayer
from .schedule import forward_step, get_alpha_and_beta, reverse_step

__all__ = ["MixingLayer", "SteppingLayer", "forward_step", "get_alpha_and_beta", "reverse_step"]
