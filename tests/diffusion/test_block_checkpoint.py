"""Checkpointed blocks: gradients as without checkpoints, and less to compute again than torch.utils.checkpoint has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.diffusion.block_checkpoint import checkpoint


class GatedBlock(nn.Module):
    """A feed-forward block that ends with a gate, as those of diffusion transformers do."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, gates, options=None):
        gate = gates["gate"].tanh()
        y = x + gate * self.down(nn.functional.gelu(self.up(x)))
        return (y, options) if options else y


def block_and_inputs(dtype=torch.float64, tokens=256):
    torch.manual_seed(0)
    block = GatedBlock().to(dtype).requires_grad_(False)
    return (
        block,
        torch.randn(2, tokens, 32, dtype=dtype, requires_grad=True),
        {"gate": torch.randn(2, 1, 32, dtype=dtype)},
    )


def pulled(output, x, **options):
    return torch.autograd.grad(output.square().sum(), x, **options)[0]


def flops_of_vjp(function, x):
    with Tracker("cpu") as tracker:
        output = function()
        forward = tracker.flops
        pulled(output, x)
    return tracker.flops - forward


def test_gradients_are_those_of_the_block():
    block, x, gates = block_and_inputs()
    expected = block(x, gates)
    got, options = checkpoint(block, x, gates, options=["passed on"])
    assert torch.equal(got, expected) and options == ["passed on"]
    assert torch.equal(pulled(got, x), pulled(expected, x))


def test_gradients_of_weights_and_gates():
    """What wants a gradient gets one, be it an input of the block or a weight of it, and however small it is."""
    block, x, gates = block_and_inputs()
    block.requires_grad_(True)
    gates["gate"].requires_grad_(True)
    leaves = [x, gates["gate"], *block.parameters()]
    expected, got = (
        torch.autograd.grad(call(block, x, gates).square().sum(), leaves)
        for call in (lambda block, *args: block(*args), checkpoint)
    )
    assert all(map(torch.equal, got, expected))


def test_the_product_before_the_last_gate_is_not_computed_again():
    block, x, gates = block_and_inputs()
    plain = flops_of_vjp(lambda: block(x, gates), x)
    ours = flops_of_vjp(lambda: checkpoint(block, x, gates), x)
    theirs = flops_of_vjp(lambda: torch_checkpoint(block, x, gates, use_reentrant=False), x)
    product = 2 * 2 * 256 * 32 * 128
    assert theirs == plain + 2 * product and ours == plain + product


def test_the_graph_keeps_inputs_and_what_is_small():
    block, x, gates = block_and_inputs()
    with Tracker("cpu") as tracker:
        output = checkpoint(block, x, gates)
        kept = tracker.held - output.numel() * output.element_size()
    assert kept == gates["gate"].numel() * 8 < 0.01 * x.numel() * 8
    del output


def test_a_graph_is_differentiated_several_times():
    block, x, gates = block_and_inputs()
    output, expected = checkpoint(block, x, gates), pulled(block(x, gates), x)
    for _ in range(3):
        assert torch.equal(pulled(output, x, retain_graph=True), expected)


def test_second_derivatives():
    block, x, gates = block_and_inputs()
    expected, got = (
        pulled(pulled(call(x, gates), x, create_graph=True), x)
        for call in (block, lambda *args: checkpoint(block, *args))
    )
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outer", [checkpoint, lambda *args: torch_checkpoint(*args, use_reentrant=False)])
@pytest.mark.parametrize("inner", [checkpoint, lambda *args: torch_checkpoint(*args, use_reentrant=False)])
def test_checkpoints_inside_checkpoints(outer, inner):
    """The inner block's inputs are dropped, too: they are computed again with the outer block."""
    block, x, gates = block_and_inputs()

    def two(x, gates, call):
        return call(block, call(block, x.sin(), gates), gates).cos()

    with Tracker("cpu") as tracker:
        got = outer(two, x, gates, inner)
        kept = tracker.held - got.numel() * got.element_size()
    assert kept < 0.1 * x.numel() * 8
    expected = two(x, gates, lambda block, *args: block(*args))
    assert torch.equal(pulled(got, x), pulled(expected, x))


def test_autocast_is_as_it_was():
    block, x, gates = block_and_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = block(x, gates), checkpoint(block, x, gates)
    assert torch.equal(got, expected)
    assert torch.equal(pulled(got, x), pulled(expected, x))


def test_without_a_graph_and_without_gradients():
    block, x, gates = block_and_inputs()
    with torch.no_grad():
        assert not checkpoint(block, x, gates).requires_grad
    assert not checkpoint(block, x.detach(), gates).requires_grad


def test_inputs_that_were_changed_in_place_are_refused():
    block, x, gates = block_and_inputs()
    given = x.clone()
    output = checkpoint(block, given, gates)
    with torch.no_grad():
        given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pulled(output, x)


def test_a_block_is_computed_again_from_the_same_tensor_objects():
    """Lean layers find in attributes of a tensor what it can be computed from."""
    _, x, _ = block_and_inputs()
    calls = []

    def noting(x):
        calls.append(x)
        return x.sin().exp()

    given = x * 2
    pulled(checkpoint(noting, given), x)
    assert [call is given for call in calls] == [True, True]


def test_a_block_that_computes_something_else_is_refused():
    _, x, _ = block_and_inputs()
    calls = []

    def changing(x):
        calls.append(x)
        return x.sin().exp() if len(calls) == 1 else x.sin()

    output = checkpoint(changing, x)
    with pytest.raises(RuntimeError, match=r"^unet: a checkpointed block saved 2 tensors .*, and 1 when"):
        pulled(output, x)


def test_graphs_are_freed_without_the_cycle_collector():
    import gc
    import weakref

    block, x, gates = block_and_inputs()
    gc.collect()
    gc.disable()
    try:
        given = x * 2
        seen, output = weakref.ref(given), checkpoint(block, given, gates)
        del given
        pulled(output, x)
        del output
        assert seen() is None
    finally:
        gc.enable()
