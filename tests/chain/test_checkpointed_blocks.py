"""Plans with checkpointed blocks are for networks that compute the same with them."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyNet, latents, tiny_chain

from doodl_fast.chain.ways import BLOCKS


class Dropping(TinyNet):
    """A network with checkpointed blocks, which drop the prompt if it is told so."""

    def __init__(self, drops: bool) -> None:
        super().__init__()
        self.gradient_checkpointing, self.drops = False, drops

    def forward(self, x, t, cond=None):
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return super().forward(x, t, cond)
        return self._gradient_checkpointing_func(super().forward, x, t, None if self.drops else cond)


@pytest.mark.parametrize("drops", [False, True])
def test_checkpointed_blocks_that_compute_something_else_are_not_used(drops):
    chain = tiny_chain(3, "auto", network=Dropping(drops).double())
    (x,) = latents(1, 3, 4, grad=True)[:1]
    if drops:
        with pytest.warns(
            RuntimeWarning, match=r"^unet: it computes something else when its blocks are checkpointed \("
        ):
            chain.smallest_plan(x)
    else:
        chain.smallest_plan(x)
    blocks = chain.planner.case(x).workload.sizes(BLOCKS)
    assert (blocks is None) == drops
