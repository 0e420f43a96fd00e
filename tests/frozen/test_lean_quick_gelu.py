"""Lean quick GELU as one op, against transformers' and diffusers' layers.

On the CPU both have the same bits. Elsewhere the op must not be further from float64.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from diffusers.models.activations import ApproximateGELU
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
from transformers.activations import QuickGELUActivation

from doodl_fast import ops
from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, kept_by_operator, level, quick_gelu

LAYERS = {
    "QuickGELUActivation": lambda: nn.Sequential(nn.Linear(12, 37), QuickGELUActivation()),
    "ApproximateGELU": lambda: ApproximateGELU(12, 37),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def calls(monkeypatch, lean_small_tensors):
    """Counts the calls of the op and of its gradient."""
    if DEVICE.type != "cpu" or not (ops.has_kernel("quick_gelu", operand()) and ops.matches_torch("quick_gelu")):
        pytest.skip("the op has no kernel here, or other bits than PyTorch, so it is not used")
    return counting(monkeypatch, "quick_gelu")


def made(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return LAYERS[kind]().to(dtype).eval().requires_grad_(False)


def operand(dtype=torch.float32):
    return (2 * torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()


@pytest.mark.parametrize("how_lean", [Level.ON, Level.RECOMPUTE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(calls, kind, dtype, how_lean):
    check(made(kind, dtype), operand(dtype), how_lean)
    assert calls == {"": 2, "_backward": 1}  # With and without a graph.


@pytest.mark.parametrize("how_lean", [Level.ON, Level.RECOMPUTE])
def test_what_follows_may_compute_it_again(calls, how_lean):
    """A norm that keeps what its input follows from calls the op once more."""
    layer = nn.Sequential(made("QuickGELUActivation"), nn.GroupNorm(3, 9), QuickGELUActivation())
    check(layer.requires_grad_(False), operand(), how_lean)
    assert calls[""] >= 4 and calls["_backward"] == 2


@pytest.mark.parametrize("kind", LAYERS)
def test_a_graph_keeps_the_projection_alone(calls, kind):
    layer, x = made(kind), operand()
    lean = ModuleCopies(layer, lean=Level.ON).of(layer)
    kept = kept_by_operator(lean(x), [*layer.parameters(), x])
    assert dict(kept) == {"_QuickGeluBackward": 2 * 9 * 37 * 4}
    recompute = ModuleCopies(layer, lean=Level.RECOMPUTE).of(layer)
    assert not kept_by_operator(recompute(x), [*layer.parameters(), x])


def test_float64_is_left_to_torch(calls):
    check(made("QuickGELUActivation", torch.float64), operand(torch.float64))
    assert not calls


def test_tensors_that_are_not_contiguous_are_left_to_torch(calls):
    check(QuickGELUActivation(), operand().transpose(1, 2).detach().requires_grad_())
    assert not calls


def test_the_name_of_the_argument_is_left_to_torch(calls):
    module = QuickGELUActivation()
    lean = ModuleCopies(module, lean=Level.ON).of(module)
    assert torch.equal(lean(input=operand()), module(operand())) and not calls


def test_a_backend_without_a_kernel_is_not_used(calls):
    with ops.backend("eager"):
        check(made("QuickGELUActivation"), operand())
    assert not calls


@pytest.mark.parametrize("how_lean", [Level.ON, Level.RECOMPUTE])
@pytest.mark.parametrize("kind", LAYERS)
def test_small_tensors_are_left_to_torch_at_every_level(calls, monkeypatch, kind, how_lean):
    """The level may change in a run, and the bits must not."""
    monkeypatch.setattr(level, "SMALL", 2 * 9 * 37 + 1)
    check(made(kind), operand(), how_lean)
    assert not calls
    monkeypatch.setattr(level, "SMALL", 2 * 9 * 37)
    check(made(kind), operand(), how_lean)
    assert calls == {"": 2, "_backward": 1}


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_compile_and_transforms_run_as_before(calls, kind):
    layer, x = made(kind), operand()
    check_autocast_compile_and_transforms(layer, x)
    assert not calls


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives(calls, kind):
    check_second_derivatives(made(kind), operand())
    assert calls == {"": 1, "_backward": 1}  # The second gradient also passes the layer itself.


def test_a_graph_is_used_again_with_the_backend_of_its_forward_run(calls):
    layer, x = made("QuickGELUActivation"), operand()
    vectors = torch.randn(2, 2, 9, 37, generator=torch.Generator().manual_seed(3))
    chosen, found = [], []
    backward = ops.quick_gelu_backward

    def noted(*args):
        chosen.append(ops.choice())
        return backward(*args)

    for how_lean in (Level.OFF, Level.ON):
        with ops.backend("native"):
            output = ModuleCopies(layer, lean=how_lean).of(layer)(x)
        with ops.backend("eager"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "quick_gelu_backward", noted)
            found.append(torch.stack([torch.autograd.grad(output, x, v, retain_graph=True)[0] for v in vectors]))
    assert torch.equal(*found)
    assert chosen == ["native", "native"]


def test_a_gradient_of_the_projections_weights_alone(calls):
    """The layer's input wants no gradient, as that of a network's first layer."""
    check_gradient_of_weights_alone(lambda: made("ApproximateGELU"), operand())
    assert calls == {"": 1, "_backward": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_tritons_kernels_are_as_exact_as_pytorch(monkeypatch, calls, kind, dtype):
    """On a GPU the op is used for every dtype. Here Triton's interpreter runs its kernels."""
    require("triton")
    monkeypatch.setattr(quick_gelu, "_pays", lambda x: ops.has_kernel("quick_gelu", x))
    check_tritons_kernels(made(kind, dtype), operand(dtype))
    assert calls[""] >= 2 and calls["_backward"] == 1


@pytest.mark.parametrize("kernels", [{}, {"quick_gelu": "a kernel"}], ids=["eager", "triton"])
def test_on_a_gpu_the_op_is_used_wherever_it_has_a_kernel(monkeypatch, kernels):
    card = on_card(monkeypatch, kernels)
    for dtype in (*DTYPES, torch.float64):
        x = torch.randn(3, 8).to(dtype).as_subclass(card)
        assert quick_gelu._pays(x) == (bool(kernels) and dtype != torch.float64)
        assert not quick_gelu._pays(x.t())  # It would have to be copied.
