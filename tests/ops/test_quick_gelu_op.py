"""Quick GELU on every backend: against float64, against PyTorch's operators, as a registered op."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, DEVICE, DTYPES
from layer_cases import EPSILON, distance, drawn, exact, with_gradient
from ops_cases import require

from doodl_fast import ops
from doodl_fast.ops.backends import native, registry

# Odd sizes end in the middle of a vector or a block.
SHAPES = [(1,), (130,), (3, 7), (2, 5, 33), (3, 2 * 1030)]


def layer(x):
    return x * torch.sigmoid(1.702 * x)


def fused(x, grad):
    return ops.quick_gelu(x), ops.quick_gelu_backward(grad, x)


def operands(shape, dtype, scale=1.0):
    return drawn(shape, torch.float64).mul(scale).to(dtype), drawn(shape, dtype, 1)


# Against float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, shape, dtype):
    """Up to six results are rounded to the dtype one after the other, each by half an epsilon."""
    x, grad = operands(shape, DTYPES[dtype], 2.0)
    for got, truth in zip(fused(x, grad), exact(layer, x, grad), strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape and got.is_contiguous()
        assert distance(got, truth) <= 3 * EPSILON[x.dtype]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_in_half_precision_it_is_as_close_to_float64_as_torch(backend, dtype):
    x, grad = operands((40, 130), DTYPES[dtype], 2.0)
    want, torchs = exact(layer, x, grad), with_gradient(layer, x, grad)
    for ours, theirs, truth in zip(fused(x, grad), torchs, want, strict=True):
        assert distance(ours, truth) <= 1.01 * distance(theirs, truth)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_large_arguments_and_what_is_not_finite(backend, dtype):
    """They give what PyTorch's operators give: zero or the argument, NaN for infinities. None spoils another."""
    values = [-torch.inf, -1e4, -200.0, -60.0, -0.0, 0.0, 60.0, 200.0, 1e4, torch.inf, torch.nan]
    x = torch.tensor(values * 5, device=DEVICE).to(DTYPES[dtype])
    grad = torch.full_like(x, 3.0)
    for got, want in zip(fused(x, grad), with_gradient(layer, x, grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-30, equal_nan=True)


# Against PyTorch's operators, bit for bit


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernels are for the CPU")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_native_kernels_have_the_bits_of_torch(dtype, threads):
    """The last elements of a thread's part are computed by other code in PyTorch."""
    require("native")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if native.instruction_set() == "baseline" or not ops.matches_torch("quick_gelu"):
            pytest.skip("this PyTorch was compiled in another way, or for another processor")
        for size in (*range(1, 70), 127, 1001, 32767, 32769, 65541, 100_003):
            for scale in (1.0, 20.0):
                x, grad = operands((size,), DTYPES[dtype], scale)
                for got, want in zip(fused(x, grad), with_gradient(layer, x, grad), strict=True):
                    assert torch.equal(got, want), size
    finally:
        torch.set_num_threads(before)


def test_the_eager_kernels_are_torchs_operators():
    with ops.backend("eager"):
        for dtype in DTYPES.values():
            x, grad = operands((3, 41), dtype, 2.0)
            assert all(map(torch.equal, fused(x, grad), with_gradient(layer, x, grad)))


def test_matches_torch_says_no_for_a_backend_with_other_bits():
    require("triton", "cpu")
    with ops.backend("triton"):
        assert not ops.matches_torch("quick_gelu")


# Layouts


def test_layouts(backend):
    """Tensors that are not contiguous are copied first."""
    x, grad = operands((3, 4, 18), torch.float32)
    want = fused(x, grad)
    for change in (
        lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
        lambda z: torch.stack([z, z], -1)[..., 1],
    ):
        for got, expected in zip(fused(change(x), change(grad)), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
            assert got.is_contiguous()


def test_empty_tensors_and_numbers(backend):
    for shape in ((0, 4), (2, 0), ()):
        x, grad = operands(shape, torch.float32)
        y, grad_x = fused(x, grad)
        assert y.shape == grad_x.shape == x.shape


# The registered op


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    require(backend)
    x, grad = operands((2, 3, 5), torch.float32)
    with ops.backend(backend):
        torch.library.opcheck(torch.ops.doodl_fast.quick_gelu.default, (x.clone().requires_grad_(),))
        torch.library.opcheck(torch.ops.doodl_fast.quick_gelu_backward.default, (grad, x))


def test_opcheck_of_the_native_kernels():
    require("native", "cpu")
    x, grad = (z.cpu() for z in operands((2, 3, 5), torch.float32))
    library, utilities = torch.ops.doodl_fast_native, ("test_schema", "test_faketensor")
    torch.library.opcheck(library.quick_gelu.default, (torch.empty_like(x), x), test_utils=utilities)
    torch.library.opcheck(library.quick_gelu_backward.default, (torch.empty_like(x), grad, x), test_utils=utilities)


@pytest.mark.parametrize("backend", ["eager", "native"])  # What is not a first derivative takes no kernel.
def test_derivatives_of_every_kind(backend):
    """First and second derivatives, forward mode, batched gradients and vmap."""
    require(backend)
    x, _ = operands((2, 8), torch.float64)
    tangent, leaf = x.cos(), x.clone().requires_grad_()
    with ops.backend(backend):
        assert torch.autograd.gradcheck(ops.quick_gelu, (leaf,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(ops.quick_gelu, (leaf,))
        pairs = (leaf.detach().sin().requires_grad_(), leaf)
        assert torch.autograd.gradcheck(ops.quick_gelu_backward, pairs, check_forward_ad=True)
        ours, theirs = (torch.func.jvp(f, (x,), (tangent,)) for f in (ops.quick_gelu, layer))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        batch = torch.stack([x, tangent, x + tangent])
        torch.testing.assert_close(torch.func.vmap(ops.quick_gelu)(batch), layer(batch))
        grads = torch.func.vmap(ops.quick_gelu_backward)(batch, batch)
        torch.testing.assert_close(grads, with_gradient(layer, batch, batch)[1])


def test_compiles_without_a_graph_break(backend):
    x, grad = operands((3, 12), torch.float32)

    def step(x, grad):
        return ops.quick_gelu(x.sin()), ops.quick_gelu_backward(grad, x.sin()).cos()

    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, grad)
    assert all(torch.equal(g, w) for g, w in zip(got, step(x, grad), strict=True))
    leaf = x.clone().requires_grad_()
    # Autograd computes the gradients of a GPU's tensors in a thread of its own, which is in no block of `ops.backend`.
    want = with_gradient(ops.quick_gelu, x, grad)[1]
    torch.compile(ops.quick_gelu, fullgraph=True, backend="aot_eager")(leaf).backward(grad)
    assert torch.equal(leaf.grad, want)


def test_the_graph_keeps_the_input_alone():
    x = operands((4, 64), torch.float32)[0].requires_grad_()
    y = ops.quick_gelu(x)
    assert [tensor.data_ptr() for tensor in y.grad_fn.saved_tensors] == [x.data_ptr()]


# What is refused


def test_what_does_not_fit_is_refused():
    x, grad = operands((2, 6), torch.float32)
    with pytest.raises(TypeError, match=r"x: expected fp16, bf16, fp32 or fp64, got torch\.int32"):
        ops.quick_gelu(x.int())
    with pytest.raises(ValueError, match=r"grad_y: expected x's shape \(2, 6\), got \(2, 3\)"):
        ops.quick_gelu_backward(grad[:, :3], x)
    with pytest.raises(TypeError, match=r"grad_y: expected x's dtype torch\.float32, got torch\.float64"):
        ops.quick_gelu_backward(grad.double(), x)
    with pytest.raises(ValueError, match=r"grad_y: expected x's device .*, got meta"):
        ops.quick_gelu_backward(grad.to("meta"), x)


def test_the_native_kernels_check_their_arguments():
    require("native", "cpu")
    x, grad = (z.cpu() for z in operands((4, 8), torch.float32))
    library, out = torch.ops.doodl_fast_native, torch.empty_like(x)
    with pytest.raises(RuntimeError, match="x: expected contiguous memory"):
        library.quick_gelu(out, drawn((8, 4), torch.float32).cpu().t())
    with pytest.raises(RuntimeError, match="x: expected elements"):
        library.quick_gelu(out, x[:0])
    with pytest.raises(RuntimeError, match="y: expected 32 elements, got 24"):
        library.quick_gelu(out[:3], x)
    with pytest.raises(RuntimeError, match="y: expected the target's dtype"):
        library.quick_gelu(out.double(), x)
    with pytest.raises(RuntimeError, match="y: expected contiguous memory"):
        library.quick_gelu(out.t().contiguous().t(), x)
    with pytest.raises(RuntimeError, match="grad_y: expected contiguous memory"):
        library.quick_gelu_backward(out, grad.t().contiguous().t(), x)
    with pytest.raises(RuntimeError, match="grad_x: expected contiguous memory"):
        library.quick_gelu_backward(out.t().contiguous().t(), grad, x)
    with pytest.raises(RuntimeError, match="grad_x: expected 32 elements, got 16"):
        library.quick_gelu_backward(out[:2], grad, x)


def test_a_gpu_has_tritons_kernel():
    require("triton")
    assert "quick_gelu" in registry._table("triton", "cuda")
