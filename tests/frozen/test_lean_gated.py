"""Lean GEGLU and SwiGLU as one op, against diffusers' layers.

On the CPU both have the same bits. Elsewhere the op rounds where PyTorch does, and must not be further from float64.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention import BasicTransformerBlock
from lean_cases import (
    check,
    check_autocast_compile_and_transforms,
    check_gradient_of_weights_alone,
    check_second_derivatives,
    check_tritons_kernels,
    counting,
    on_card,
)
from ops_cases import require
from torch import nn
from torch.nn import functional as F

from doodl_fast import ops
from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, gated, lean_report, level

LAYERS = {"GEGLU": GEGLU, "SwiGLU": SwiGLU}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def calls(monkeypatch, lean_small_tensors):
    """Counts the calls of the op and of its gradient."""
    if DEVICE.type != "cpu" or not ops.matches_torch("gated_activation"):
        pytest.skip("the op has other bits than PyTorch here, so it is not used")
    return counting(monkeypatch, "gated_activation")


def made(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return LAYERS[kind](12, 37).to(dtype).eval().requires_grad_(False)


def operand(dtype=torch.float32, rows=9):
    generator = torch.Generator().manual_seed(1)
    return (2 * torch.randn(2 if rows > 1 else 1, rows, 12, generator=generator)).to(dtype).requires_grad_()


@pytest.mark.parametrize("how_lean", [Level.ON, Level.RECOMPUTE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(calls, kind, dtype, how_lean):
    check(made(kind, dtype), operand(dtype), how_lean)
    assert calls == {"": 2, "_backward": 1}  # With and without a graph.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transformer_block(calls, dtype):
    torch.manual_seed(0)
    block = BasicTransformerBlock(12, 2, 6, activation_fn="geglu").to(dtype).eval().requires_grad_(False)
    check(block, operand(dtype))
    assert calls == {"": 2, "_backward": 1}


def test_a_single_row_is_left_to_torch(calls):
    """PyTorch has another kernel for the contiguous half of a single row."""
    check(made("GEGLU"), operand(rows=1))
    assert not calls


def test_float64_is_left_to_torch(calls):
    check(made("GEGLU", torch.float64), operand(torch.float64))
    assert not calls


def test_a_backend_with_other_bits_is_not_used(calls):
    with ops.backend("eager"):
        check(made("GEGLU"), operand())
    assert not calls


@pytest.mark.parametrize("how_lean", [Level.ON, Level.RECOMPUTE])
def test_small_tensors_are_left_to_torch_at_every_level(calls, monkeypatch, how_lean):
    """The level may change in a run, and the bits must not."""
    monkeypatch.setattr(level, "SMALL", operand().numel() + 1)
    check(made("GEGLU"), operand(), how_lean)
    assert not calls
    monkeypatch.setattr(level, "SMALL", operand().numel())
    check(made("GEGLU"), operand(), how_lean)
    assert calls == {"": 2, "_backward": 1}


def test_autocast_compile_and_transforms_run_as_before(calls):
    layer, x = made("SwiGLU"), operand()
    check_autocast_compile_and_transforms(layer, x)
    assert not calls


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives(calls, kind):
    check_second_derivatives(made(kind), operand())
    assert calls == {"": 1, "_backward": 1}  # The second gradient also passes the layer itself.


def test_a_graph_is_used_again_with_the_backend_of_its_forward_run(calls):
    layer, x = made("GEGLU"), operand()
    vectors = torch.randn(2, 2, 9, 37, generator=torch.Generator().manual_seed(3))
    found = []
    for how_lean in (Level.OFF, Level.ON):
        output = ModuleCopies(layer, lean=how_lean).of(layer)(x)
        with ops.backend("eager"):
            found.append(torch.stack([torch.autograd.grad(output, x, v, retain_graph=True)[0] for v in vectors]))
    assert torch.equal(*found)
    assert calls == {"": 1, "_backward": 2}


def test_a_gradient_of_the_projections_weights_alone(calls):
    """The layer's input wants no gradient, as that of a network's first layer."""
    check_gradient_of_weights_alone(lambda: made("GEGLU"), operand())
    assert calls == {"": 1, "_backward": 1}


def test_another_activation_in_a_swiglu_is_left_alone(calls):
    layer = made("SwiGLU")
    layer.activation = nn.ReLU()
    check(layer, operand())
    assert not calls
    assert "SwiGLU: it has a function of its own" in str(lean_report(layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_tritons_kernels_are_as_exact_as_pytorch(monkeypatch, calls, kind, dtype):
    """On a GPU the op is used for every dtype. Here Triton's interpreter runs its kernels."""
    require("triton")
    monkeypatch.setattr(gated, "_pays", lambda x: ops.has_kernel("gated_activation", x))
    check_tritons_kernels(made(kind, dtype), operand(dtype))
    assert calls == {"": 2, "_backward": 1}


@pytest.mark.parametrize("kernels", [{}, {"gated_activation": "a kernel"}], ids=["eager", "triton"])
def test_on_a_gpu_the_op_is_used_wherever_it_has_a_kernel(monkeypatch, kernels):
    card = on_card(monkeypatch, kernels)
    monkeypatch.setattr(gated, "Tensor", card)
    for dtype in (*DTYPES, torch.float64):
        x = torch.randn(3, 8).to(dtype).as_subclass(card)
        assert gated._pays(x) == (bool(kernels) and dtype != torch.float64)
        assert not gated._pays(x.t())  # It would have to be copied.


def test_what_a_lean_layer_keeps():
    x = torch.randn(64, 128).requires_grad_()
    y = gated.gated(x, gated.GELU, one_op=True)
    assert [tensor.data_ptr() for tensor in y.grad_fn.saved_tensors] == [x.data_ptr()]
    hidden, gate = x.chunk(2, -1)
    assert torch.equal(y, hidden * F.gelu(gate))
