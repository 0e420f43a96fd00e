"""Exact arithmetic: the two latents as integers, so that undoing a coupling gives back the same bits."""
