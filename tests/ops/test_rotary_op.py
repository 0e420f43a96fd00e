"""Rotary embeddings on every backend: against diffusers' function and its gradient bit for bit, as a registered op."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, DEVICE, DTYPES
from diffusers.models.embeddings import apply_rotary_emb
from layer_cases import bound, distance, drawn, exact, with_gradient
from ops_cases import require

from doodl_fast import ops
from doodl_fast.ops.backends import native, registry

PAIRS = {"adjacent": -1, "halves": -2}
"""The kinds of pairs, with diffusers' number of each."""
SHAPES = [(1, 1, 1, 2), (2, 3, 2, 6), (1, 7, 3, 34), (2, 5, 4, 64), (1, 3, 24, 128), (2, 2, 1, 2050)]
"""Some end in the middle of a vector or of a block."""
ROUNDED = ["fp32", "bf16", "fp16"]


def tables(shape, own=False, dtype=torch.float32):
    """Two tables of which no two numbers belong to one angle, so that each must be used where it belongs."""
    batch, tokens, _, size = shape
    rows = (batch, tokens, size) if own else (tokens, size)
    return drawn(rows, dtype, 2), drawn(rows, dtype, 3)


def operands(shape, dtype, own=False):
    return drawn(shape, dtype), drawn(shape, dtype, 1), *tables(shape, own)


def diffusers(cos, sin, pairs):
    """diffusers' function. It takes one table for all samples."""

    def function(x):
        if cos.ndim == 2:
            return apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=PAIRS[pairs], sequence_dim=1)
        both = zip(x.split(1), zip(cos, sin, strict=True), strict=True)
        options = {"use_real_unbind_dim": PAIRS[pairs], "sequence_dim": 1}
        return torch.cat([apply_rotary_emb(one, table, **options) for one, table in both])

    return function


def op(cos, sin, pairs):
    return lambda x: ops.rotary_embedding(x, cos, sin, pairs)


@pytest.mark.parametrize("own", [False, True], ids=["one table", "a table each"])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_diffusers(backend, shape, dtype, pairs, own):
    x, grad, cos, sin = operands(shape, DTYPES[dtype], own)
    want, want_grad = with_gradient(diffusers(cos, sin, pairs), x, grad)
    got, got_grad = ops.rotary_embedding(x, cos, sin, pairs), ops.rotary_embedding_backward(grad, cos, sin, pairs)
    assert torch.equal(got, want) and got.is_contiguous()
    assert torch.equal(got_grad, want_grad) and got_grad.is_contiguous()
    assert all(map(torch.equal, with_gradient(op(cos, sin, pairs), x, grad), (want, want_grad)))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_double_precision(backend, shape, pairs):
    """diffusers' function computes in single precision whatever it is given."""
    x, grad, cos, sin = (z.double() for z in operands(shape, torch.float64))

    def rotated(x):
        halves = x.unflatten(-1, (-1, 2) if pairs == "adjacent" else (2, -1))
        a, b = halves.unbind(-1 if pairs == "adjacent" else -2)
        return torch.stack([-b, a], -1 if pairs == "adjacent" else -2).flatten(-2)

    def plain(x):
        return x * cos[:, None] + rotated(x) * sin[:, None]

    for got, want in zip(with_gradient(op(cos, sin, pairs), x, grad), with_gradient(plain, x, grad), strict=True):
        assert torch.equal(got, want)


def test_angles_turn_pairs_and_keep_their_length(backend):
    """With cosines and sines of angles, a rotation by the opposite angles gives x again."""
    shape = (2, 9, 3, 16)
    angles = drawn((9, 8), torch.float32).repeat_interleave(2, -1)
    x = drawn(shape, torch.float32)
    y = ops.rotary_embedding(x, angles.cos(), angles.sin())
    assert distance(y.unflatten(-1, (-1, 2)).norm(dim=-1), x.double().unflatten(-1, (-1, 2)).norm(dim=-1)) < 1e-6
    assert distance(ops.rotary_embedding(y, angles.cos(), -angles.sin()), x.double()) < 1e-6
    assert distance(ops.rotary_embedding_backward(y, angles.cos(), angles.sin()), x.double()) < 1e-6


@pytest.mark.parametrize("pairs", PAIRS)
def test_against_float64(backend, pairs):
    x, grad, cos, sin = operands((2, 7, 3, 34), torch.float32)
    want = exact(lambda x: ops.rotary_embedding(x, cos.double(), sin.double(), pairs), x, grad)
    for got, truth in zip(with_gradient(op(cos, sin, pairs), x, grad), want, strict=True):
        assert distance(got, truth) <= bound(torch.float32, 4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    require("native", "cpu")
    before, results = torch.get_num_threads(), []
    x, grad, cos, sin = (z.cpu() for z in operands((2, 301, 4, 34), torch.bfloat16))
    with ops.backend("native"):
        for number in (1, threads):
            torch.set_num_threads(number)
            try:
                results.append([ops.rotary_embedding(x, cos, sin), ops.rotary_embedding_backward(grad, cos, sin)])
            finally:
                torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_matches_torch_on_every_backend():
    """Every backend has the bits, whatever instruction set the native one was compiled for."""
    require("native", "cpu")
    for backend in ("native", "eager"):
        with ops.backend(backend):
            assert ops.matches_torch("rotary_embedding"), native.instruction_set()


def test_layouts_and_tables_of_other_dtypes(backend):
    """Tensors that are not contiguous are copied first, tables in half precision are read as they are."""
    x, grad, cos, sin = operands((3, 4, 2, 18), torch.float32)
    want = ops.rotary_embedding(x, cos, sin), ops.rotary_embedding_backward(grad, cos, sin)
    for change in (lambda z: z.transpose(1, 2).contiguous().transpose(1, 2), lambda z: torch.stack([z, z], -1)[..., 1]):
        got = ops.rotary_embedding(change(x), cos, sin), ops.rotary_embedding_backward(change(grad), cos, sin)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, want, strict=True))
    assert torch.equal(ops.rotary_embedding(x, cos.t().contiguous().t(), sin), want[0])
    half = cos.half(), sin.half()
    assert torch.equal(ops.rotary_embedding(x, *half), ops.rotary_embedding(x, *(z.float() for z in half)))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)])
def test_empty_tensors(backend, shape):
    x, grad, cos, sin = operands(shape, torch.float32)
    assert ops.rotary_embedding(x, cos, sin).shape == ops.rotary_embedding_backward(grad, cos, sin).shape == shape


# The registered op


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pairs", range(2))
def test_opcheck(backend, pairs):
    require(backend)
    x, grad, cos, sin = operands((2, 3, 2, 10), torch.float32)
    with ops.backend(backend):
        leaf = x.clone().requires_grad_()
        torch.library.opcheck(torch.ops.doodl_fast.rotary_embedding.default, (leaf, cos, sin, pairs))
        torch.library.opcheck(torch.ops.doodl_fast.rotary_embedding_backward.default, (grad, cos, sin, pairs))


def test_opcheck_of_the_native_kernels():
    require("native", "cpu")
    x, _, cos, sin = (z.cpu() for z in operands((2, 3, 2, 10), torch.float32))
    library, utilities = torch.ops.doodl_fast_native, ("test_schema", "test_faketensor")
    for name in ("rotary_embedding", "rotary_embedding_backward"):
        call = (torch.empty_like(x), x, cos, sin, 1)
        torch.library.opcheck(getattr(library, name).default, call, test_utils=utilities)


@pytest.mark.parametrize("backend", ["eager", "native"])  # What is not a first derivative takes no kernel.
@pytest.mark.parametrize("pairs", PAIRS)
def test_derivatives_of_every_kind(backend, pairs):
    """First and second derivatives, forward mode, batched gradients and vmap."""
    require(backend)
    x, grad, cos, sin = (z.double() for z in operands((2, 3, 2, 4), torch.float64))
    function, tangent = op(cos, sin, pairs), x.cos()
    leaf = x.clone().requires_grad_()
    with ops.backend(backend):
        assert torch.autograd.gradcheck(function, (leaf,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, (leaf,))

        def backward(grad):
            return ops.rotary_embedding_backward(grad, cos, sin, pairs)

        assert torch.autograd.gradcheck(backward, (grad.clone().requires_grad_(),), check_forward_ad=True)
        value, directional = torch.func.jvp(function, (x,), (tangent,))
        assert torch.equal(value, function(x)) and torch.equal(directional, function(tangent))  # It is linear.
        batch = torch.stack([x, tangent, x + tangent])
        torch.testing.assert_close(torch.func.vmap(function)(batch), torch.stack([function(z) for z in batch]))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", ROUNDED)
def test_derivatives_of_transforms_have_the_bits_of_the_kernels(dtype, pairs):
    x, grad, cos, sin = operands((2, 5, 2, 18), DTYPES[dtype])
    _, pull = torch.func.vjp(op(cos, sin, pairs), x)
    assert torch.equal(pull(grad)[0], ops.rotary_embedding_backward(grad, cos, sin, pairs))


@pytest.mark.parametrize("dtype", ROUNDED)
def test_subnormal_numbers(backend, dtype):
    x, grad, cos, sin = operands((1, 5, 2, 18), DTYPES[dtype])
    tiny = 4 * torch.finfo(x.dtype).smallest_normal
    x, grad = x * tiny, grad * tiny
    want = with_gradient(diffusers(cos, sin, "adjacent"), x, grad)
    assert all(map(torch.equal, with_gradient(op(cos, sin, "adjacent"), x, grad), want))


def test_compiles_without_a_graph_break(backend):
    x, grad, cos, sin = operands((2, 3, 2, 12), torch.float32)

    def step(x, grad):
        return ops.rotary_embedding(x.sin(), cos, sin), ops.rotary_embedding_backward(grad, cos, sin, "halves").cos()

    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, grad)
    assert all(map(torch.equal, got, step(x, grad)))
    leaf = x.clone().requires_grad_()
    torch.compile(op(cos, sin, "adjacent"), fullgraph=True, backend="aot_eager")(leaf).backward(grad)
    assert torch.equal(leaf.grad, with_gradient(op(cos, sin, "adjacent"), x, grad)[1])


def test_the_graph_keeps_the_tables_alone():
    x, _, cos, sin = operands((1, 4, 2, 64), torch.float32)
    y = ops.rotary_embedding(x.requires_grad_(), cos, sin)
    assert [z.data_ptr() for z in y.grad_fn.saved_tensors] == [cos.data_ptr(), sin.data_ptr()]


# What is refused


def test_what_does_not_fit_is_refused():
    x, grad, cos, sin = operands((2, 3, 4, 6), torch.float32)
    with pytest.raises(ValueError, match="pairs: expected one of 'adjacent', 'halves', got 'odd'"):
        ops.rotary_embedding(x, cos, sin, "odd")
    with pytest.raises(
        ValueError, match=r"x: expected a tensor \(B, S, H, D\) with an even D, got the shape \(3, 4, 6\)"
    ):
        ops.rotary_embedding(x[0], cos, sin)
    with pytest.raises(
        ValueError, match=r"x: expected a tensor \(B, S, H, D\) with an even D, got the shape \(2, 3, 4, 5"
    ):
        ops.rotary_embedding(x[..., :5], cos, sin)
    with pytest.raises(TypeError, match=r"x: expected fp16, bf16, fp32 or fp64, got torch\.int32"):
        ops.rotary_embedding(x.int(), cos, sin)
    with pytest.raises(
        ValueError, match=r"cos: expected the shape \(3, 6\) or \(2, 3, 6\) of a table of x's tokens, got"
    ):
        ops.rotary_embedding(x, cos[:2], sin[:2])
    with pytest.raises(ValueError, match=r"cos: expected the shape .* of a table of grad_y's tokens, got \(3, 3\)"):
        ops.rotary_embedding_backward(grad, cos[:, :3], sin[:, :3])
    with pytest.raises(ValueError, match=r"sin: expected cos's shape \(3, 6\), got \(2, 6\)"):
        ops.rotary_embedding(x, cos, sin[:2])
    with pytest.raises(TypeError, match=r"sin: expected cos's dtype torch\.float32, got torch\.float64"):
        ops.rotary_embedding(x, cos, sin.double())
    with pytest.raises(
        TypeError, match=r"cos: expected fp16, bf16 or fp32 with x in torch\.float32, got fp64; round the"
    ):
        ops.rotary_embedding(x, cos.double(), sin.double())
    with pytest.raises(ValueError, match=r"cos: expected x's device .*, got meta"):
        ops.rotary_embedding(x, cos.to("meta"), sin.to("meta"))
    for function in (ops.rotary_embedding, ops.rotary_embedding_backward):
        with pytest.raises(
            ValueError, match=r"cos, sin: expected tables of which no gradient is wanted, .* detach them"
        ):
            function(x, cos.clone().requires_grad_(), sin)


def test_the_native_kernels_check_their_arguments():
    require("native", "cpu")
    x, _, cos, sin = (z.cpu() for z in operands((2, 3, 4, 6), torch.float32))
    library, y = torch.ops.doodl_fast_native, torch.empty(2, 3, 4, 6)
    with pytest.raises(RuntimeError, match="x: expected contiguous memory"):
        library.rotary_embedding(y, x.transpose(1, 2), cos, sin, 0)
    with pytest.raises(RuntimeError, match="x: expected elements and four dimensions"):
        library.rotary_embedding(y, x[0], cos, sin, 0)
    with pytest.raises(RuntimeError, match="x: expected an even last dimension"):
        library.rotary_embedding(y, x[..., :5].contiguous(), cos, sin, 0)
    with pytest.raises(RuntimeError, match="pairs: expected 0 or 1"):
        library.rotary_embedding(y, x, cos, sin, 2)
    with pytest.raises(RuntimeError, match="cos: expected 18 elements, got 12"):
        library.rotary_embedding(y, x, cos[:2], sin, 0)
    with pytest.raises(RuntimeError, match="sin: expected contiguous memory in the dtype of the arithmetic"):
        library.rotary_embedding(y, x, cos, sin.half(), 0)
    with pytest.raises(RuntimeError, match="grad_y: expected contiguous memory"):
        library.rotary_embedding_backward(y, x.transpose(1, 2), cos, sin, 0)
    with pytest.raises(RuntimeError, match="grad_x: expected 144 elements, got 72"):
        library.rotary_embedding_backward(y[:1], x, cos, sin, 0)


def test_a_gpu_has_tritons_kernel():
    require("triton")
    assert "rotary_embedding" in registry._table("triton", "cuda")
    assert DEVICE.type != "cuda" or ops.has_kernel("rotary_embedding", torch.empty(1, device=DEVICE))
