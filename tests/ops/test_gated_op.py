"""Gated activations on every backend: against float64, against PyTorch's and diffusers' layers, as a registered op."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, DEVICE, DTYPES
from diffusers.models import activations
from layer_cases import EPSILON, bound, distance, drawn, exact, with_gradient
from ops_cases import require
from torch.nn import functional as F

from doodl_fast import ops
from doodl_fast.ops.backends import native, registry

ACTS = {"gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}
# Odd halves end in the middle of a vector or a block.
SHAPES = [(2, 2), (1, 128), (3, 14), (2, 5, 66), (2, 3, 2 * 1030)]

LIBRARY_ERF = 3e-7
"""PyTorch's vectors, and so the native kernels, take an approximation of the error function that is off by 1.5e-7
(Abramowitz and Stegun, 7.1.26), which GELU's derivative adds to in relation to values below one."""


def layer(activation):
    def function(x):
        hidden, gate = x.chunk(2, -1)
        return hidden * ACTS[activation](gate)

    return function


def fused(x, grad, activation):
    return ops.gated_activation(x, activation), ops.gated_activation_backward(grad, x, activation)


def operands(shape, dtype, scale=1.0):
    return drawn(shape, torch.float64).mul(scale).to(dtype), drawn((*shape[:-1], shape[-1] // 2), dtype, 1)


def allowed(dtype):
    """How far from float64 a result may be, which is rounded twice in half precision."""
    twice = 2.0 if dtype in (torch.float16, torch.bfloat16) else 1.0
    return twice * bound(dtype, 4) + (0.0 if dtype == torch.float64 else LIBRARY_ERF)


# Against float64


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, shape, dtype, activation):
    x, grad = operands(shape, DTYPES[dtype], 2.0)
    for got, truth in zip(fused(x, grad, activation), exact(layer(activation), x, grad), strict=True):
        assert got.dtype == x.dtype and got.is_contiguous()
        assert distance(got, truth) <= allowed(x.dtype)


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_in_half_precision_it_is_as_close_to_float64_as_torch(backend, dtype, activation):
    """It rounds where PyTorch's layers do, so nearly all elements are the same."""
    x, grad = operands((40, 2 * 130), DTYPES[dtype], 2.0)
    want, torchs = exact(layer(activation), x, grad), with_gradient(layer(activation), x, grad)
    for ours, theirs, truth in zip(fused(x, grad, activation), torchs, want, strict=True):
        assert distance(ours, truth) <= 1.01 * distance(theirs, truth)
        assert float((ours == theirs).double().mean()) >= 0.98


@pytest.mark.parametrize("activation", ACTS)
def test_large_arguments_and_what_is_not_finite(backend, activation):
    """The activation is zero, or its argument, and its derivative zero or one. One element spoils no other."""
    gate = torch.tensor([-1e15, -1e4, -200.0, -95.0, 95.0, 200.0, 1e4, torch.nan] * 5, device=DEVICE)
    hidden = torch.full_like(gate, 2.0)
    x, grad = torch.cat([hidden, gate])[None], torch.full((1, 40), 3.0, device=DEVICE)
    y, grad_x = fused(x, grad, activation)
    high = gate.clamp(min=0)
    value = torch.stack([2 * high, 3 * high, 6.0 * (gate > 0)])
    value[:, gate.isnan()] = torch.nan
    got = torch.cat([y, *grad_x.chunk(2, -1)])
    assert torch.equal(got.isnan(), value.isnan())
    assert torch.allclose(got.nan_to_num(), value.nan_to_num(), rtol=1e-6, atol=1e-30)


# Against PyTorch's and diffusers' layers, bit for bit


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernels are for the CPU")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_the_native_kernels_have_the_bits_of_torch(activation, threads):
    """The last elements of a row, and of a thread's part, are computed by other code in PyTorch."""
    require("native")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if native.instruction_set() == "baseline" or not ops.matches_torch("gated_activation"):
            pytest.skip("this PyTorch was compiled in another way, or for another processor")
        for rows in (2, 7, 77, 401):
            for half in (1, 7, 16, 31, 33, 43, 64, 83, 320):
                for dtype, scale in (("fp32", 1.0), ("fp32", 20.0), ("bf16", 2.0), ("fp16", 2.0)):
                    x, grad = operands((rows, 2 * half), DTYPES[dtype], scale)
                    want = with_gradient(layer(activation), x, grad)
                    for got, theirs in zip(fused(x, grad, activation), want, strict=True):
                        assert torch.equal(got, theirs), (x.shape, dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("make", "activation"), [(activations.GEGLU, "gelu"), (activations.SwiGLU, "silu")], ids=["GEGLU", "SwiGLU"]
)
def test_diffusers_layers(backend, make, activation, dtype):
    torch.manual_seed(0)
    module = make(12, 40).to(DEVICE, DTYPES[dtype])
    x, grad = drawn((2, 9, 12), DTYPES[dtype]), drawn((2, 9, 40), DTYPES[dtype], 1)

    def ours(x):
        return ops.gated_activation(module.proj(x), activation)

    for got, want in zip(with_gradient(ours, x, grad), with_gradient(module, x, grad), strict=True):
        if backend == "native" and ops.matches_torch("gated_activation"):
            assert torch.equal(got, want)
        assert distance(got, want) <= 4 * EPSILON[x.dtype]


def test_matches_torch_says_no_for_a_backend_with_other_bits():
    require("triton", "cpu")
    with ops.backend("triton"):
        assert not ops.matches_torch("gated_activation")
    with pytest.raises(ValueError, match=r"op: expected one of .*'gated_activation'.*, got 'coupling'"):
        ops.matches_torch("coupling")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_threads_change_no_bit(dtype):
    """Elsewhere the elements that PyTorch computes one by one depend on its threads."""
    require("native")
    activation, (x, grad) = "gelu_tanh", operands((90, 2 * 401), DTYPES[dtype])
    before = torch.get_num_threads()
    results = []
    with ops.backend("native"):
        for number in (1, 3):
            torch.set_num_threads(number)
            try:
                results.append(fused(x, grad, activation))
            finally:
                torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Layouts


def test_layouts(backend):
    """Tensors that are not contiguous are copied first."""
    x, grad = operands((3, 4, 18), torch.float32)
    want = fused(x, grad, "gelu")
    for change in (
        lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
        lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),
        lambda z: torch.stack([z, z], -1)[..., 1],
    ):
        for got, expected in zip(fused(change(x), change(grad), "gelu"), want, strict=True):
            assert torch.equal(got, expected) and got.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 6)])
def test_empty_tensors(backend, shape):
    x, grad = operands(shape, torch.float32)
    y, grad_x = fused(x, grad, "silu")
    assert y.shape == grad.shape and grad_x.shape == x.shape


# The registered op


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", range(3))
def test_opcheck(backend, activation):
    require(backend)
    x, grad = operands((2, 3, 10), torch.float32)
    with ops.backend(backend):
        leaf = x.clone().requires_grad_()
        torch.library.opcheck(torch.ops.doodl_fast.gated_activation.default, (leaf, activation))
        torch.library.opcheck(torch.ops.doodl_fast.gated_activation_backward.default, (grad, x, activation))


def test_opcheck_of_the_native_kernels():
    require("native", "cpu")
    x, grad = (z.cpu() for z in operands((2, 3, 10), torch.float32))
    library, utilities = torch.ops.doodl_fast_native, ("test_schema", "test_faketensor")
    torch.library.opcheck(library.gated_activation.default, (torch.empty_like(grad), x, 0), test_utils=utilities)
    call = (torch.empty_like(x), grad, x, 2)
    torch.library.opcheck(library.gated_activation_backward.default, call, test_utils=utilities)


@pytest.mark.parametrize("backend", ["eager", "native"])  # What is not a first derivative takes no kernel.
@pytest.mark.parametrize("activation", ACTS)
def test_derivatives_of_every_kind(backend, activation):
    """First and second derivatives, forward mode, batched gradients and vmap."""
    require(backend)
    x, _ = operands((2, 8), torch.float64)
    tangent, plain, leaf = x.cos(), layer(activation), x.clone().requires_grad_()

    def op(x):
        return ops.gated_activation(x, activation)

    with ops.backend(backend):
        assert torch.autograd.gradcheck(op, (leaf,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(op, (leaf,))
        for ours, theirs in zip(
            torch.func.jvp(op, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        batch = torch.stack([x, tangent, x + tangent])
        torch.testing.assert_close(torch.func.vmap(op)(batch), plain(batch))


def test_compiles_without_a_graph_break(backend):
    x, grad = operands((3, 12), torch.float32)

    def step(x, grad):
        return ops.gated_activation(x.sin(), "silu"), ops.gated_activation_backward(grad, x.sin(), "silu").cos()

    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, grad)
    assert all(torch.equal(g, w) for g, w in zip(got, step(x, grad), strict=True))
    leaf = x.clone().requires_grad_()
    # Autograd computes the gradients of a GPU's tensors in a thread of its own, which is in no block of `ops.backend`.
    want = with_gradient(lambda x: ops.gated_activation(x, "silu"), x, grad)[1]
    torch.compile(lambda x: ops.gated_activation(x, "silu"), fullgraph=True, backend="aot_eager")(leaf).backward(grad)
    assert torch.equal(leaf.grad, want)


def test_the_graph_keeps_the_input_alone():
    x = operands((4, 64), torch.float32)[0].requires_grad_()
    y = ops.gated_activation(x, "gelu")
    assert [tensor.data_ptr() for tensor in y.grad_fn.saved_tensors] == [x.data_ptr()]


# What is refused


def test_what_does_not_fit_is_refused():
    x, grad = operands((2, 6), torch.float32)
    with pytest.raises(ValueError, match="activation: expected one of 'gelu', 'gelu_tanh', 'silu', got 'relu'"):
        ops.gated_activation(x, "relu")
    with pytest.raises(ValueError, match=r"x: expected a tensor \(..., 2 n\) of two halves, got the shape \(2, 5\)"):
        ops.gated_activation(x[:, :5])
    with pytest.raises(ValueError, match=r"x: expected a tensor \(..., 2 n\) of two halves, got the shape \(\)"):
        ops.gated_activation(x[0, 0])
    with pytest.raises(TypeError, match=r"x: expected fp16, bf16, fp32 or fp64, got torch\.int32"):
        ops.gated_activation(x.int())
    with pytest.raises(ValueError, match=r"grad_y: expected the shape \(2, 3\) of a half of x, got \(2, 6\)"):
        ops.gated_activation_backward(x, x)
    with pytest.raises(TypeError, match=r"grad_y: expected x's dtype torch\.float32, got torch\.float64"):
        ops.gated_activation_backward(grad.double(), x)
    with pytest.raises(ValueError, match=r"grad_y: expected x's device .*, got meta"):
        ops.gated_activation_backward(grad.to("meta"), x)


def test_the_native_kernels_check_their_arguments():
    require("native", "cpu")
    x, grad = (z.cpu() for z in operands((4, 8), torch.float32))
    library, y, grad_x = torch.ops.doodl_fast_native, torch.empty_like(grad), torch.empty_like(x)
    with pytest.raises(RuntimeError, match="x: expected contiguous memory"):
        library.gated_activation(y, drawn((8, 4), torch.float32).cpu().t(), 0)
    with pytest.raises(RuntimeError, match="x: expected an even last dimension"):
        library.gated_activation(y, x[:, :5].contiguous(), 0)
    with pytest.raises(RuntimeError, match="activation: expected 0, 1 or 2"):
        library.gated_activation(y, x, 3)
    with pytest.raises(RuntimeError, match="y: expected 16 elements, got 12"):
        library.gated_activation(y[:3], x, 0)
    with pytest.raises(RuntimeError, match="y: expected the target's dtype"):
        library.gated_activation(y.double(), x, 0)
    with pytest.raises(RuntimeError, match="grad_y: expected contiguous memory"):
        library.gated_activation_backward(grad_x, y.t().contiguous().t(), x, 0)
    with pytest.raises(RuntimeError, match="grad_x: expected 32 elements, got 16"):
        library.gated_activation_backward(y, grad, x, 0)


def test_a_gpu_has_tritons_kernel():
    require("triton")
    assert "gated_activation" in registry._table("triton", "cuda")
