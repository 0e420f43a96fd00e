"""GroupNorm with SiLU on every backend: against float64, against PyTorch's own kernels, and as a registered op."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import BACKENDS, DEVICE, DTYPES
from layer_cases import bound, distance, drawn, exact, with_gradient
from ops_cases import require
from torch.nn import functional as F

from doodl_fast import ops
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.ops import matching
from doodl_fast.ops.backends import native, registry

# The shapes, with their numbers of groups. Odd sizes end in the middle of a vector, a block, or a part of a group.
CASES = [
    ((1, 8, 5, 7), 4),
    ((1, 40, 3, 3), 2),
    ((2, 12), 3),
    ((3, 20, 11), 1),
    ((1, 6, 2, 9, 11), 2),
    ((1, 4, 33, 40), 2),
]
LAYOUTS = {
    "contiguous": lambda z: z.contiguous(),
    "channels_last": lambda z: z.to(memory_format=torch.channels_last),
    "transposed": lambda z: z.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda z: torch.stack([z, z], -1)[..., 1],
    "expanded": lambda z: z[:1].expand(z.shape),
}


def layer(groups, weight, bias, silu=True):
    def function(x):
        weights = (None if z is None else z.to(x.dtype) for z in (weight, bias))
        y = F.group_norm(x, groups, *weights, 1e-5)
        return F.silu(y) if silu else y

    return function


def fused(x, grad, groups, weight, bias, silu=True):
    y, mean, rstd = ops.group_norm_silu(x, weight, bias, groups, 1e-5, silu)
    return y, ops.group_norm_silu_backward(grad, x, mean, rstd, weight, bias, groups, silu)


def operands(shape, dtype, mean=0.0):
    weight, bias = drawn((2, shape[1]), dtype, 2)
    return drawn(shape, dtype, 0, mean), drawn(shape, dtype, 1), weight, bias


# Against float64


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_against_float64(backend, shape, groups, dtype, silu):
    x, grad, weight, bias = operands(shape, DTYPES[dtype], 0.5)
    others = ((None, None), (weight, None), (None, bias)) if dtype == "fp32" else ()
    for w, b in ((weight, bias), *others):
        want = exact(layer(groups, w, b, silu), x, grad)
        for got, truth in zip(fused(x, grad, groups, w, b, silu), want, strict=True):
            assert got.dtype == x.dtype
            assert distance(got, truth) <= bound(x.dtype, 4)


def test_a_group_of_one_element(backend):
    """It has no deviation, so y depends on the bias alone, and the gradient is zero, up to roundings of rstd = 316."""
    x, grad, weight, bias = operands((2, 4, 1, 1), torch.float32)
    y, grad_x = fused(x, grad, 4, weight, bias)
    assert distance(y, F.silu(bias.double()).expand(2, 4).reshape(y.shape)) <= bound(torch.float32, 1000)
    assert float(grad_x.abs().max()) <= 5000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_and_rstd(backend, dtype):
    x, _, weight, bias = operands((2, 12, 9, 5), DTYPES[dtype], 3.0)
    _, mean, rstd = ops.group_norm_silu(x, weight, bias, 4, 0.1)
    groups = x.double().reshape(2, 4, -1)
    assert mean.dtype == rstd.dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    assert mean.shape == rstd.shape == (2, 4)
    assert distance(mean, groups.mean(-1)) <= bound(mean.dtype, 2)
    assert distance(rstd, (groups.var(-1, correction=0) + 0.1).rsqrt()) <= bound(mean.dtype, 8)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_never_further_from_float64_than_torch(layout, mean, name):
    """With a mean far from zero, PyTorch's sums over channels_last tensors lose digits; the native kernels' do not.

    On a GPU both sum float32 numbers as trees, each in its own order, so chance decides which is closer: by one epsilon
    of float32 at most.
    """
    require("native")
    allowed = 0.0 if DEVICE.type == "cpu" else torch.finfo(torch.float32).eps
    x, grad, weight, bias = operands((2, 40, 17, 33), DTYPES[name], mean)
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    want = exact(layer(4, weight, bias), x, grad)
    torchs = with_gradient(layer(4, weight, bias), x, grad)
    with ops.backend("native"):
        got = fused(x, grad, 4, weight, bias)
    for ours, theirs, truth in zip(got, torchs, want, strict=True):
        assert distance(ours, truth) <= distance(theirs, truth) + allowed


def test_a_large_mean_does_not_cost_the_digits_of_the_variance(backend):
    """The mean is 300 deviations. The subtraction of it alone costs 300 units in the last place."""
    x, grad, weight, bias = operands((1, 8, 40, 50), torch.float32, 300.0)
    for layout in ("contiguous", "channels_last"):
        if backend == "eager" and layout == "channels_last":
            continue  # PyTorch's own kernel loses them.
        want = exact(layer(2, weight, bias), x, grad)
        got = fused(LAYOUTS[layout](x), LAYOUTS[layout](grad), 2, weight, bias)
        for ours, truth in zip(got, want, strict=True):
            assert distance(ours, truth) <= bound(torch.float32, 300)


# Against PyTorch's own kernels, bit for bit


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernels are for the CPU")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("silu", [True, False])
def test_the_native_kernels_have_the_bits_of_torch(silu, threads):
    require("native")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if native.instruction_set() == "baseline" or not ops.matches_torch():
            pytest.skip("this PyTorch was compiled in another way, or for another processor")
        for (groups, per_group), size in itertools.product(
            [(1, 1), (2, 3), (4, 4), (2, 7), (8, 10), (2, 20), (3, 30), (1, 47)],
            [(1, 1), (1, 7), (3, 5), (4, 4), (9, 11), (32, 33), (64, 64)],
        ):
            if groups * per_group * size[0] * size[1] > 200_000:
                continue
            x, grad, weight, bias = operands((2, groups * per_group, *size), torch.float32, 0.5)
            want = with_gradient(layer(groups, weight, bias, silu), x, grad)
            for got, theirs in zip(fused(x, grad, groups, weight, bias, silu), want, strict=True):
                assert torch.equal(got, theirs), (x.shape, groups)
    finally:
        torch.set_num_threads(before)


def test_matches_torch_says_no_for_a_backend_with_other_bits():
    require("triton", "cpu")
    with ops.backend("triton"):
        assert not ops.matches_torch()


def test_the_comparison_is_no_part_of_the_callers_memory():
    """A plan of memory is made by counting what a first call allocates."""
    expected = ops.matches_torch()
    matching._matches_torch.cache_clear()
    with torch.device("meta"), Tracker("cpu") as tracker:
        assert ops.matches_torch() == expected
        assert tracker.peak == 0
        torch.ones(256, device="cpu")
    assert tracker.peak == 1024


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads, layout):
    require("native")
    x, grad, weight, bias = operands((2, 10, 90, 101), torch.bfloat16, 0.5)
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    before = torch.get_num_threads()
    results = []
    with ops.backend("native"):
        for number in (threads, 1):
            torch.set_num_threads(number)
            try:
                results.append(fused(x, grad, 2, weight, bias))
            finally:
                torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Layouts, special values, dtypes of weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    x, grad, weight, bias = operands((2, 12, 5, 6), torch.float32)
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    want = exact(layer(3, weight, bias), x, grad)
    got = fused(x, grad, 3, weight, bias)
    kept = layout in ("contiguous", "channels_last")
    for ours, truth in zip(got, want, strict=True):
        assert ours.stride() == (x.stride() if kept else x.contiguous().stride())
        assert distance(ours, truth) <= bound(torch.float32, 4)


def test_a_gradient_of_another_layout(backend):
    x, grad, weight, bias = operands((2, 12, 5, 6), torch.float32)
    want = fused(x, grad, 3, weight, bias)[1]
    got = fused(x, grad.to(memory_format=torch.channels_last), 3, weight, bias)[1]
    assert torch.equal(got, want) and got.is_contiguous()


def test_channels_last_in_three_dimensions(backend):
    x, grad, weight, bias = operands((2, 6, 3, 4, 5), torch.float32)
    want = exact(layer(3, weight, bias), x, grad)
    x, grad = (z.to(memory_format=torch.channels_last_3d) for z in (x, grad))
    for ours, truth in zip(fused(x, grad, 3, weight, bias), want, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last_3d)
        assert distance(ours, truth) <= bound(torch.float32, 4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weights_in_float32_with_a_half_precision_input(backend, dtype):
    x, grad, *_ = operands((2, 8, 5, 7), DTYPES[dtype])
    weight, bias = drawn((2, 8), torch.float32, 2)
    want = exact(layer(4, weight, bias), x, grad)
    for ours, truth in zip(fused(x, grad, 4, weight, bias), want, strict=True):
        assert ours.dtype == x.dtype and distance(ours, truth) <= bound(x.dtype, 4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_arguments_of_silu(backend, layout):
    """exp(-z) overflows for z below -88, where SiLU and its derivative are zero."""
    x, grad, weight, _ = operands((1, 4, 6, 6), torch.float32)
    bias = torch.tensor([-400.0, -95.0, 95.0, 400.0], device=DEVICE)
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    want = exact(layer(2, weight, bias), x, grad)
    for ours, truth in zip(fused(x, grad, 2, weight, bias), want, strict=True):
        assert bool(torch.isfinite(ours).all()) and distance(ours, truth) <= bound(torch.float32, 4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinity_stay_in_their_group(backend, layout):
    x, grad, weight, bias = operands((2, 4, 3, 5), torch.float32)
    x[0, 1, 0, 0], x[1, 3, 2, 2] = torch.nan, torch.inf
    y, grad_x = fused(LAYOUTS[layout](x), LAYOUTS[layout](grad), 2, weight, bias)
    for result in (y, grad_x):
        bad = result.isnan().reshape(2, 2, -1)
        assert bad.any(-1).tolist() == [[True, False], [False, True]]
        assert bool(bad[0, 0].all())


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_empty_tensors(backend, shape):
    x, grad, weight, bias = operands(shape, torch.float32)
    y, grad_x = fused(x, grad, 2, weight, bias)
    assert y.shape == grad_x.shape == shape


# The registered op


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    require(backend)
    x, grad, weight, bias = operands((2, 6, 3, 4), torch.float32)
    last = x.to(memory_format=torch.channels_last)
    with ops.backend(backend):
        for y in (x, last):
            for weights in ((weight, bias), (None, None)):
                call = (y.detach().requires_grad_(), *weights, 3, 1e-5, True)
                torch.library.opcheck(torch.ops.doodl_fast.group_norm_silu.default, call)
                _, mean, rstd = ops.group_norm_silu(y, *weights, 3)
                call = (grad, y, mean, rstd, *weights, 3, False)
                torch.library.opcheck(torch.ops.doodl_fast.group_norm_silu_backward.default, call)


def test_opcheck_of_the_native_kernels():
    require("native", "cpu")
    x, grad, weight, bias = (z.cpu() for z in operands((2, 6, 3, 4), torch.float32))
    mean, rstd = torch.zeros(2, 2, 3)
    library = torch.ops.doodl_fast_native
    utilities = ("test_schema", "test_faketensor")
    call = (torch.empty_like(x), mean, rstd, x, weight, bias, 3, 1e-5, True)
    torch.library.opcheck(library.group_norm_silu.default, call, test_utils=utilities)
    call = (torch.empty_like(x), grad, x, mean, rstd, weight, bias, 3, True)
    torch.library.opcheck(library.group_norm_silu_backward.default, call, test_utils=utilities)


@pytest.mark.parametrize("backend", ["eager", "native"])  # What is not a first derivative takes no kernel.
@pytest.mark.parametrize("silu", [True, False])
def test_derivatives_of_every_kind(backend, silu):
    """First and second derivatives, forward mode, batched gradients and vmap."""
    require(backend)
    x, grad, weight, bias = operands((1, 4, 2, 2), torch.float64)
    plain, leaf = layer(2, weight, bias, silu), x.clone().requires_grad_()

    def op(x):
        return ops.group_norm_silu(x, weight, bias, 2, 1e-5, silu)[0]

    with ops.backend(backend):
        assert torch.autograd.gradcheck(op, (leaf,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(op, (leaf,))
        for ours, theirs in zip(torch.func.jvp(op, (x,), (grad,)), torch.func.jvp(plain, (x,), (grad,)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        batch = torch.stack([x, grad, x + grad])
        torch.testing.assert_close(torch.func.vmap(op)(batch), torch.stack([plain(z) for z in batch]))


def test_only_the_input_gets_a_gradient():
    x, _, weight, bias = operands((2, 4, 2, 2), torch.float32)
    y, mean, rstd = ops.group_norm_silu(x.requires_grad_(), weight, bias, 2)
    assert y.requires_grad and not mean.requires_grad and not rstd.requires_grad
    with pytest.raises(RuntimeError, match="expected frozen weights, but a gradient of weight or bias is wanted"):
        ops.group_norm_silu(x, weight.requires_grad_(), bias, 2)
    with torch.no_grad():
        ops.group_norm_silu(x, weight, bias, 2)


def test_compiles_without_a_graph_break(backend):
    x, grad, weight, bias = operands((2, 4, 3, 5), torch.float32)

    def step(x, grad):
        y, mean, rstd = ops.group_norm_silu(x.sin(), weight, bias, 2)
        return y, ops.group_norm_silu_backward(grad, x.sin(), mean, rstd, weight, bias, 2).cos()

    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, grad)
    assert all(torch.equal(g, w) for g, w in zip(got, step(x, grad), strict=True))

    def normalise(x):
        return ops.group_norm_silu(x, weight, bias, 2)[0]

    # Autograd computes the gradients of a GPU's tensors in a thread of its own, which is in no block of `ops.backend`.
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(normalise(leaf), leaf, grad)[0] if x.is_cuda else fused(x, grad, 2, weight, bias)[1]
    torch.compile(normalise, fullgraph=True, backend="aot_eager")(leaf).backward(grad)
    assert torch.equal(leaf.grad, want)


# What is refused


def test_what_does_not_fit_is_refused():
    x, grad, weight, bias = operands((2, 6, 3, 3), torch.float32)
    _, mean, rstd = ops.group_norm_silu(x, weight, bias, 3)
    with pytest.raises(ValueError, match="num_groups: expected a divisor of x's 6 channels, got 4"):
        ops.group_norm_silu(x, weight, bias, 4)
    with pytest.raises(ValueError, match=r"x: expected a tensor \(N, C, ...\), got the shape \(6,\)"):
        ops.group_norm_silu(weight, None, None, 1)
    with pytest.raises(ValueError, match=r"weight: expected the shape \(6,\) on .*, got \(5,\)"):
        ops.group_norm_silu(x, weight[:5], bias, 3)
    with pytest.raises(TypeError, match=r"bias: expected at most float32 with x in torch\.float32, got torch\.float64"):
        ops.group_norm_silu(x, weight, bias.double(), 3)
    with pytest.raises(TypeError, match=r"x: expected fp16, bf16, fp32 or fp64, got torch\.int32"):
        ops.group_norm_silu(x.int(), weight, bias, 3)
    with pytest.raises(ValueError, match=r"grad_y: expected x's shape \(2, 6, 3, 3\), got \(1, 6, 3, 3\)"):
        ops.group_norm_silu_backward(grad[:1], x, mean, rstd, weight, bias, 3)
    with pytest.raises(ValueError, match=r"rstd: expected the shape \(2, 3\) on .*, got \(2, 2\)"):
        ops.group_norm_silu_backward(grad, x, mean, rstd[:, :2], weight, bias, 3)
    with pytest.raises(TypeError, match=r"mean: expected torch\.float32 with x in torch\.float32, got torch\.float64"):
        ops.group_norm_silu_backward(grad, x, mean.double(), rstd, weight, bias, 3)


def test_the_native_kernels_check_their_arguments():
    require("native", "cpu")
    x, _, weight, bias = (z.cpu() for z in operands((2, 6, 3, 4), torch.float32))
    mean, rstd = torch.zeros(2, 2, 3)
    library = torch.ops.doodl_fast_native
    y = x.transpose(2, 3)
    last = torch.empty_like(x, memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="y: expected the shape and the strides of x"):
        library.group_norm_silu(last, mean, rstd, x, weight, bias, 3, 1e-5, True)
    with pytest.raises(RuntimeError, match="grad_y: expected the shape and the strides of x"):
        library.group_norm_silu_backward(torch.empty_like(x), last, x, mean, rstd, weight, bias, 3, True)
    with pytest.raises(RuntimeError, match="x: expected memory that is contiguous or channels_last"):
        library.group_norm_silu(torch.empty_like(y), mean, rstd, y, weight, bias, 3, 1e-5, True)
    with pytest.raises(RuntimeError, match="num_groups: expected a divisor of the channels"):
        library.group_norm_silu(torch.empty_like(x), mean, rstd, x, weight, bias, 5, 1e-5, True)
    with pytest.raises(RuntimeError, match="rstd: expected 6 elements, got 4"):
        library.group_norm_silu(torch.empty_like(x), mean, rstd[:, :2], x, weight, bias, 3, 1e-5, True)
    with pytest.raises(RuntimeError, match="weight: expected 6 elements, got 5"):
        library.group_norm_silu(torch.empty_like(x), mean, rstd, x, weight[:5], bias, 3, 1e-5, True)
    with pytest.raises(RuntimeError, match="mean: expected contiguous memory in the dtype of the arithmetic"):
        library.group_norm_silu(torch.empty_like(x), mean.double(), rstd, x, weight, bias, 3, 1e-5, True)


def test_a_backend_without_the_kernel_leaves_it_to_the_next(monkeypatch):
    """The native backend has no kernels of layers for CUDA, where Triton's are the next."""
    require("native")
    monkeypatch.setattr(registry, "why_not", lambda name, device_type: None)
    couplings = registry._table("native", "cuda")
    assert "coupling" in couplings and "group_norm_silu" not in couplings
    table = registry._completed(couplings, "cuda")
    assert table["coupling"] is couplings["coupling"]
    triton = registry._table("triton", "cuda")["group_norm_silu"]
    assert table["group_norm_silu"].__code__ is triton.__code__ and set(table) >= set(registry.EAGER)
