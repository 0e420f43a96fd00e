"""Graphs that are kept whole, without matrix products, or as inputs of blocks: the same bits, and sizes as measured."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_denoiser, golden_unet, latents, pull, tiny_chain
from diffusers.models.resnet import ResnetBlock2D
from planned_chains import auto, fix

from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.chain.ways import BLOCKS, RECOMPUTE, SMALLEST, WHOLE
from doodl_fast.solvers.edict import EDICT

MIXTURES = {
    "whole": ((WHOLE, 6),),
    "without products": ((RECOMPUTE, 6),),
    "blocks": ((BLOCKS, 6),),
    "all ways": ((BLOCKS, 1), (RECOMPUTE, 2), (WHOLE, 1)),
    "blocks and whole": ((BLOCKS, 2), (WHOLE, 2)),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("way", [WHOLE, SMALLEST], ids=str)
@pytest.mark.parametrize(("arithmetic", "states"), [("float", "checkpoint"), ("exact", "reversible")])
def test_every_mixture_of_graphs_gives_the_same_bits(mixture, way, arithmetic, states):
    x, y = latents(1, 4, 8, 8, dtype=torch.float32, grad=True)
    plain = EDICT(golden_denoiser(torch.float32).plain(), tiny_chain(4).schedule, arithmetic=arithmetic)
    chain = auto(steps=4, arithmetic=arithmetic)
    assert chain.num_network_calls == 6
    expected, outputs = plain(x, y), fix(chain, MIXTURES[mixture], states, way)(x, y)
    assert all(map(torch.equal, outputs, expected))
    assert all(map(torch.equal, pull(outputs, [x, y]), pull(expected, [x, y])))
    assert arithmetic == "float" or chain.drift == 0


def test_a_mixture_in_a_network_that_cannot_be_copied():
    """Its own flags say whether blocks are checkpointed, and do so for single calls."""
    unet, sizes = golden_unet(torch.float32), []
    forward = unet.forward

    def watched(*args, **options):
        before = tracker.held
        output = forward(*args, **options)
        if torch.is_grad_enabled():
            sizes.append(tracker.held - before)
        return output

    unet.forward = watched
    try:
        x, y = latents(1, 4, 8, 8, dtype=torch.float32, grad=True)
        chain = fix(auto(steps=4), ((BLOCKS, 2), (WHOLE, 2)))
        with Tracker("cpu") as tracker:
            outputs = chain(x, y)
        assert len(sizes) == 4 and max(sizes[:2]) < 0.5 * min(sizes[2:])
        got = pull(outputs, [x, y])
    finally:
        del unet.forward
    expected = pull(auto(steps=4)(x, y), [x, y])
    assert all(map(torch.equal, got, expected))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in unet.modules())


@pytest.mark.usefixtures("lean_small_tensors")
def test_measured_sizes_of_each_way():
    """Each way keeps less or holds less at once than the one before, and what it computes again is a share."""
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    sizes = [auto().planner.case(x).workload.sizes(way) for way in (WHOLE, RECOMPUTE, BLOCKS, SMALLEST)]
    assert sizes[0].again == 0 < sizes[1].again < sizes[2].again <= 1.01
    assert sizes[2].again < sizes[3].again < 2
    assert sizes[0].graph > sizes[1].graph > sizes[2].graph > sizes[3].graph
    assert sizes[0].pull > sizes[1].pull > sizes[2].pull >= sizes[3].pull / 1.001


@pytest.mark.parametrize(("form", "again"), [("lean", False), ("plain", True), ("recompute", True)])
def test_only_lean_residual_layers_keep_their_graphs_in_checkpointed_blocks(form, again, monkeypatch):
    """Their lean graphs are small; others are computed again with the rest of a block."""
    denoiser, calls = golden_denoiser(torch.float32), []
    forms = {"lean": denoiser, "plain": denoiser.plain(), "recompute": denoiser.for_recompute()}
    forward = ResnetBlock2D.forward

    def counted(layer, *args, **options):
        calls.append(layer)
        return forward(layer, *args, **options)

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    x = latents(1, 4, 16, 16, dtype=torch.float32, grad=True)[0]
    evaluator = forms[form].for_blocks()
    with evaluator.running():
        output = evaluator(x, torch.tensor(500))
        evaluated = len(calls)
        output.sum().backward()
    assert evaluated == len(set(map(id, calls))) > 0
    assert (len(calls) > evaluated) == again
