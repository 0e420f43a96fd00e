"""Tensors so small that lean layers leave them to PyTorch, and those that are large enough."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, attention, kept_by_operator, level


class Cross(nn.Module):
    """Attention to few tokens that are given once."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(32, cross_attention_dim=12, heads=2, dim_head=16)
        self.tokens = torch.randn(1, 3, 12)

    def forward(self, x):
        return self.attention(x, encoder_hidden_states=self.tokens)


LAYERS = {
    "convolution": (lambda: nn.Conv2d(8, 8, 3, padding=1), lambda n: (1, 8, n // 8), level.SMALL),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()), lambda n: (1, 8, n // 8), level.SMALL_NORM),
    "GEGLU": (lambda: GEGLU(32, 64), lambda n: (1, n // 32, 32), level.SMALL),
    "attention": (Cross, lambda n: (1, n // 32, 32), level.SMALL_QUERY),
}


def measured(layer, x, lean):
    """The output, its gradient and the bytes that the graph keeps."""
    copied = ModuleCopies(layer, lean=lean).of(layer)
    output = copied(x * 1)
    kept = sum(kept_by_operator(output, [*layer.parameters()]).values())
    return output.detach(), torch.autograd.grad(output, x, output.detach().cos())[0], kept


@pytest.mark.parametrize("kind", LAYERS)
def test_lean_layers_begin_at_a_size(kind):
    torch.manual_seed(0)
    factory, shape, limit = LAYERS[kind]
    layer = factory().eval().requires_grad_(False)
    for elements, leaves_out in ((limit // 2, False), (limit, True)):
        size = shape(elements)
        if kind in ("convolution", "group norm"):
            size = (*size[:2], size[2] // 16, 16)
        x = torch.randn(size).requires_grad_()
        assert x.numel() == elements
        plain, lean, leaner = (measured(layer, x, way) for way in (Level.OFF, Level.ON, Level.RECOMPUTE))
        for found in (lean, leaner):
            assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])
        assert (lean[2] < plain[2]) == leaves_out
        assert leaner[2] < plain[2]  # lean="recompute" is for the least memory.


def test_attention_is_watched_only_where_it_can_keep_less(monkeypatch):
    """A mode that sees every operator takes longer than small kernels."""
    watched = []
    enter = attention.Recording.__enter__
    monkeypatch.setattr(attention.Recording, "__enter__", lambda mode: [watched.append(1), enter(mode)][1])
    self_attention = Attention(32, heads=2, dim_head=16).eval().requires_grad_(False)
    x = torch.randn(1, level.SMALL_QUERY // 32, 32, requires_grad=True)
    measured(self_attention, x, Level.ON)
    assert not watched
    measured(Cross().eval().requires_grad_(False), x, Level.ON)
    assert len(watched) == 1
    measured(self_attention, x, Level.RECOMPUTE)
    assert len(watched) == 2


def test_a_small_residual_block_gives_the_same_bits():
    """Its norm and SiLU are PyTorch's, and no mark of an activation that was done stays behind."""
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=32, temb_channels=None, groups=4).eval().requires_grad_(False)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x, None)

    for side in (4, 16, 17):
        x = torch.randn(1, 32, side, side, requires_grad=True)
        plain, lean = (measured(Block(), x, way) for way in (Level.OFF, Level.ON))
        assert torch.equal(lean[0], plain[0]) and torch.equal(lean[1], plain[1])
