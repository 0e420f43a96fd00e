"""Ways to evaluate a network with a graph, which keep more or less between the same value and the same gradient."""

from __future__ import annotations

from typing import NamedTuple

from .evaluator import Evaluator


class Way(NamedTuple):
    """How much of an evaluation its graph keeps; the rest is computed again when a cotangent is pulled back.

    Attributes:
        recompute: Whether what one matrix product makes of something that is kept is left out, as with
            `Denoiser(lean="recompute")`.
        blocks: Whether the network keeps the inputs of its blocks alone (gradient checkpointing, Chen et al., arXiv
            1604.06174). A `Denoiser` with lean layers also keeps the small graphs of residual layers.
    """

    recompute: bool = False
    blocks: bool = False

    def of(self, evaluator: Evaluator) -> Evaluator | None:
        """An evaluator in this way; None if its network has no such way."""
        other: Evaluator | None = evaluator
        if self.recompute:
            other = evaluator.for_recompute()
        if self.blocks and other is not None:
            other = other.for_blocks()
        return other

    @property
    def graphs(self) -> str:
        """What is kept of evaluations, in words that "of the last 3 evaluations" can follow."""
        if self.blocks:
            return "inputs of blocks"
        return "graphs without matrix products" if self.recompute else "graphs"

    @property
    def inside(self) -> str:
        """What an evaluation keeps until its cotangent is pulled back, in words."""
        if self.blocks:
            return "inputs of its blocks" + (", and no matrix products in them" if self.recompute else "")
        return "everything but matrix products" if self.recompute else "everything"


WHOLE, RECOMPUTE, BLOCKS, SMALLEST = Way(), Way(recompute=True), Way(blocks=True), Way(True, True)
WAYS = (WHOLE, RECOMPUTE, BLOCKS, SMALLEST)
"""All ways, from the one that computes the least again to the one that holds the least at once."""
KEPT = (WHOLE, RECOMPUTE, BLOCKS)
"""Ways whose graphs are worth keeping; `SMALLEST` keeps little less than `BLOCKS` and computes much more again."""
