"""Lean layers on the meta device hold as much as their ops do where these are computed."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import activations, embeddings, normalization
from ops_cases import require
from torch import nn
from transformers.activations import QuickGELUActivation

from doodl_fast import ops
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.cli.meta_ops import fused_ops
from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, gated, modulated_norm, quick_gelu, rotary

pytestmark = pytest.mark.usefixtures("lean_small_tensors")


class Norms(nn.Module):
    """An adaptive norm, and RMSNorm of heads."""

    def __init__(self):
        super().__init__()
        self.zero, self.rms = normalization.AdaLayerNormZeroSingle(256), normalization.RMSNorm(64, 1e-6)

    def forward(self, x, emb):
        return self.rms(self.zero(x, emb=emb)[0].unflatten(-1, (4, 64)).transpose(1, 2))


class Gates(nn.Module):
    """The two layers with a gate."""

    def __init__(self):
        super().__init__()
        self.gelu, self.silu = activations.GEGLU(256, 512), activations.SwiGLU(512, 128)

    def forward(self, x, _):
        return self.silu(self.gelu(x))


class QuickGelus(nn.Module):
    """The two layers with a quick GELU."""

    def __init__(self):
        super().__init__()
        self.projected, self.linear = activations.ApproximateGELU(256, 512), nn.Linear(512, 128)
        self.activation = QuickGELUActivation()

    def forward(self, x, _):
        return self.activation(self.linear(self.projected(x)))


def held(device, module=Norms):
    """The bytes that a graph holds, and the peak of a call and its gradient."""
    with torch.device(device):
        network = module().half().eval().requires_grad_(False)
        x, emb = torch.zeros(2, 64, 256, dtype=torch.float16), torch.zeros(2, 256, dtype=torch.float16)
    lean = ModuleCopies(network, lean=Level.ON).of(network)
    with Tracker(device) as tracker:
        output = lean(x.requires_grad_(), emb)
        kept = tracker.held
        torch.autograd.grad(output, x, torch.ones_like(output))
    return kept, tracker.peak


def test_lean_norms_hold_the_same_on_the_meta_device(monkeypatch):
    require("native", "cpu")
    with fused_ops():
        estimated = held("meta")
    assert held("meta")[1] > estimated[1]  # Without the ops, PyTorch's operators hold more for a while.
    monkeypatch.setattr(modulated_norm, "_pays", lambda x, same_bits: ops.has_kernel("modulated_norm", x))
    with ops.backend("native"):
        measured = held("cpu")
    assert estimated[0] == pytest.approx(measured[0], rel=0.01)
    assert estimated[1] == pytest.approx(measured[1], rel=0.05)


def test_lean_gates_hold_the_same_on_the_meta_device(monkeypatch):
    require("native", "cpu")
    with fused_ops():
        estimated = held("meta", Gates)
    without = held("meta", Gates)
    assert without[0] == estimated[0]  # With and without the op a graph keeps the projections alone,
    assert without[1] > estimated[1]  # and PyTorch's operators hold more for a while.
    monkeypatch.setattr(gated, "_pays", lambda x: ops.has_kernel("gated_activation", x))
    with ops.backend("native"):
        measured = held("cpu", Gates)
    assert estimated == measured


def test_rotary_embeddings_hold_their_result_alone_on_the_meta_device():
    x, tables = torch.zeros(2, 64, 4, 64, dtype=torch.float16, device="meta"), torch.zeros(2, 64, 64, device="meta")
    rotate = rotary.of_embeddings(embeddings.apply_rotary_emb)

    def peak():
        with Tracker("meta") as tracker:
            y = rotate(x.requires_grad_(), tables.unbind(), sequence_dim=1)
            torch.autograd.grad(y, x, torch.ones_like(y))
        return tracker.peak

    with fused_ops():
        assert peak() == 3 * x.numel() * x.element_size()  # The result, its gradient and that of x.
    assert peak() > 6 * x.numel() * x.element_size()  # PyTorch's operators hold more for a while.


def test_lean_quick_gelus_hold_the_same_on_the_meta_device(monkeypatch):
    require("native", "cpu")
    with fused_ops():
        estimated = held("meta", QuickGelus)
    without = held("meta", QuickGelus)
    assert without[0] == estimated[0]  # With and without the op a graph keeps the arguments alone,
    assert without[1] > estimated[1]  # and PyTorch's operators hold more for a while.
    monkeypatch.setattr(quick_gelu, "_pays", lambda x: ops.has_kernel("quick_gelu", x))
    with ops.backend("native"):
        measured = held("cpu", QuickGelus)
    assert estimated == measured


def test_the_op_is_counted_where_a_gpu_would_call_it():
    x = torch.zeros(8, 64, device="meta")
    with fused_ops():
        assert gated._pays(x) and gated._pays(x.half())
        assert not any(gated._pays(other) for other in (x.double(), x.t(), x[:1]))
        assert rotary._pays(x)
        assert quick_gelu._pays(x) and quick_gelu._pays(x.half())
        assert not any(quick_gelu._pays(other) for other in (x.double(), x.t()))
    assert not gated._pays(x) and not quick_gelu._pays(x)
    assert not rotary._pays(x)
