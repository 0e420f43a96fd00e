"""LayerNorm and RMSNorm with a modulation on every backend: against float64, PyTorch's layers and diffusers'."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, DEVICE, DTYPES
from layer_cases import bound, distance, drawn, exact, with_gradient
from ops_cases import require
from torch.nn import functional as F

from doodl_fast import ops
from doodl_fast.ops.backends import native, registry

# Odd sizes end in the middle of a vector, and rows in the middle of a program's.
SHAPES = [(2, 7), (3, 5, 16), (2, 3, 4, 64), (1, 2, 1030), (2, 9, 100)]
KINDS = {
    "layer": ("", True),
    "affine": ("weight bias", True),
    "modulated": ("scale shift", True),
    "all": ("weight bias scale shift", True),
    "rms": ("weight", False),
    "modulated rms": ("scale", False),
}
"""Which vectors a norm has, and whether it subtracts the mean."""


def vectors(shape, dtype, names):
    """The named vectors of a norm: of the channels, or of the channels of each sample."""
    sizes = {"weight": shape[-1:], "bias": shape[-1:], "scale": (shape[0], shape[-1]), "shift": (shape[0], shape[-1])}
    return {name: drawn(sizes[name], dtype, 2 + i) for i, name in enumerate(sizes) if name in names.split()}


def layer(by, center=True, eps=1e-6):
    """The same by PyTorch's operators."""

    def function(x):
        given = {name: z.to(x.dtype) for name, z in by.items()}
        along = {name: given[name].reshape(len(x), *[1] * (x.ndim - 2), -1) for name in given if name[0] == "s"}
        if center:
            y = F.layer_norm(x, x.shape[-1:], given.get("weight"), given.get("bias"), eps)
        else:
            y = F.rms_norm(x, x.shape[-1:], given.get("weight"), eps)
        if "scale" in along:
            y = y * (1 + along["scale"])
        return y + along["shift"] if "shift" in along else y

    return function


def fused(x, grad, by, center=True, eps=1e-6):
    y, mean, rstd = ops.modulated_norm(x, **by, eps=eps, center=center)
    kept = {name: by[name] for name in ("weight", "scale") if name in by}
    return y, ops.modulated_norm_backward(grad, x, mean, rstd, **kept, center=center)


def operands(shape, dtype, names, mean=0.5):
    return drawn(shape, dtype, 0, mean), drawn(shape, dtype, 1), vectors(shape, dtype, names)


# Against float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(backend, dtype, kind):
    names, center = KINDS[kind]
    for shape in SHAPES if dtype == "fp32" else SHAPES[-2:]:
        x, grad, by = operands(shape, DTYPES[dtype], names)
        for got, truth in zip(fused(x, grad, by, center), exact(layer(by, center), x, grad), strict=True):
            assert got.dtype == x.dtype and got.is_contiguous()
            assert distance(got, truth) <= bound(x.dtype, 8)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["modulated", "all", "modulated rms"])
def test_in_half_precision_it_is_closer_to_float64_than_torch(backend, kind, dtype):
    """It rounds once. PyTorch rounds the norm and the product, too."""
    names, center = KINDS[kind]
    x, grad, by = operands((2, 20, 130), DTYPES[dtype], names)
    want, torchs = exact(layer(by, center), x, grad), with_gradient(layer(by, center), x, grad)
    for ours, theirs, truth in zip(fused(x, grad, by, center), torchs, want, strict=True):
        assert distance(ours, truth) <= 0.95 * distance(theirs, truth)


def test_a_large_mean_does_not_cost_the_digits_of_the_variance(backend):
    """The mean is 300 deviations. The subtraction of it alone costs 300 units in the last place."""
    x, grad, by = operands((2, 8, 300), torch.float32, "scale shift", 300.0)
    for ours, truth in zip(fused(x, grad, by), exact(layer(by), x, grad), strict=True):
        assert distance(ours, truth) <= bound(torch.float32, 300)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_and_rstd(backend, dtype, center):
    x, *_ = operands((2, 3, 40), DTYPES[dtype], "")
    _, mean, rstd = ops.modulated_norm(x, eps=0.1, center=center)
    wide = x.double()
    variance = wide.var(-1, correction=0) if center else wide.square().mean(-1)
    assert mean.dtype == rstd.dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    assert mean.shape == ((2, 3) if center else (0,)) and rstd.shape == (2, 3)
    if center:
        assert distance(mean, wide.mean(-1)) <= bound(mean.dtype, 2)
    assert distance(rstd, (variance + 0.1).rsqrt()) <= bound(mean.dtype, 8)


# Against PyTorch's and diffusers' own layers


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernels are for the CPU")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["layer", "affine", "modulated", "all"])
def test_the_native_kernels_have_the_bits_of_torch(kind, threads):
    require("native")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if native.instruction_set() == "baseline" or not ops.matches_torch("modulated_norm"):
            pytest.skip("this PyTorch was compiled in another way, or for another processor")
        for channels in (8, 16, 24, 64, 72, 384, 1152, 1536, 3072):
            x, grad, by = operands((2, 3, channels), torch.float32, KINDS[kind][0])
            want = with_gradient(layer(by), x, grad)
            for got, theirs in zip(fused(x, grad, by), want, strict=True):
                assert torch.equal(got, theirs), channels
    finally:
        torch.set_num_threads(before)


def test_diffusers_layers(backend):
    from diffusers.models import normalization

    torch.manual_seed(0)
    x, grad, emb = (
        drawn((2, 5, 24), torch.float32),
        drawn((2, 5, 24), torch.float32, 1),
        drawn((2, 24), torch.float32, 2),
    )
    zero = normalization.AdaLayerNormZero(24).to(DEVICE).requires_grad_(False)
    shift, scale, *_ = zero.linear(F.silu(emb)).chunk(6, 1)
    want = with_gradient(lambda x: zero(x, emb=emb)[0], x, grad)
    for got, theirs in zip(fused(x, grad, {"scale": scale, "shift": shift}), want, strict=True):
        assert distance(got, theirs) <= bound(torch.float32, 8)
    rms = normalization.RMSNorm(24, 1e-6).to(DEVICE).requires_grad_(False)
    rms.weight.copy_(emb[0])
    want = with_gradient(rms, x, grad)
    for got, theirs in zip(fused(x, grad, {"weight": rms.weight}, center=False), want, strict=True):
        assert distance(got, theirs) <= bound(torch.float32, 8)


# Layouts, special values, dtypes of vectors


@pytest.mark.parametrize("kind", ["modulated", "rms"])
def test_layouts(backend, kind):
    names, center = KINDS[kind]
    x, grad, by = operands((2, 5, 3, 16), torch.float32, names)
    want = fused(x, grad, by, center)
    statistics = ops.modulated_norm(x, **by, center=center)[1:]
    layouts = {
        "heads": lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),
        "transposed": lambda z: z.transpose(-1, -2).contiguous().transpose(-1, -2),
        "batch": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda z: torch.stack([z, z], -1)[..., 1],
    }
    for name, lay in layouts.items():
        got = fused(lay(x), lay(grad), by, center)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True)), name
        kept = lay(x).stride() if name == "heads" else x.stride()
        assert got[0].stride() == got[1].stride() == kept, name
        again = ops.modulated_norm(lay(x), **by, center=center)[1:]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, statistics, strict=True)), name
        assert torch.equal(fused(lay(x), grad, by, center)[1], want[1]), name


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_vectors_in_float32_with_a_half_precision_input(backend, dtype):
    x, grad, _ = operands((2, 5, 24), DTYPES[dtype], "")
    by = vectors((2, 5, 24), torch.float32, "weight bias scale shift")
    for ours, truth in zip(fused(x, grad, by), exact(layer(by), x, grad), strict=True):
        assert ours.dtype == x.dtype and distance(ours, truth) <= bound(x.dtype, 8)


def test_constant_rows_and_nan(backend):
    """A constant row has no deviation: y is the shift, up to roundings of rstd = 1000. NaN stays in its row."""
    x, grad, by = operands((2, 4, 16), torch.float32, "scale shift")
    x[0, 0], x[1, 2, 3] = 4.0, torch.nan
    y, grad_x = fused(x, grad, by)
    assert torch.allclose(y[0, 0], by["shift"][0], atol=1e-5)
    for result in (y, grad_x):
        assert result.isnan().all(-1).nonzero().tolist() == result.isnan().any(-1).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty_tensors(backend, shape):
    x, grad, by = operands(shape, torch.float32, "scale shift")
    y, grad_x = fused(x, grad, by)
    assert y.shape == grad_x.shape == shape


def test_threads_change_no_bit():
    require("native")
    x, grad, by = operands((2, 300, 100), torch.bfloat16, "weight bias scale shift")
    before, results = torch.get_num_threads(), []
    with ops.backend("native"):
        for number in (3, 1):
            torch.set_num_threads(number)
            try:
                results.append(fused(x, grad, by))
            finally:
                torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# The registered op


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["layer", "all", "rms"])
def test_opcheck(backend, kind):
    require(backend)
    names, center = KINDS[kind]
    x, grad, by = operands((2, 3, 4, 8), torch.float32, names)
    given = [by.get(name) for name in ("weight", "bias", "scale", "shift")]
    with ops.backend(backend):
        for y in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            call = (y.detach().requires_grad_(), *given, 1e-6, center)
            torch.library.opcheck(torch.ops.doodl_fast.modulated_norm.default, call)
            _, mean, rstd = ops.modulated_norm(y, *given, 1e-6, center)
            call = (grad, y, mean, rstd, given[0], given[2], center)
            torch.library.opcheck(torch.ops.doodl_fast.modulated_norm_backward.default, call)


@pytest.mark.parametrize("backend", ["eager", "native"])  # What is not a first derivative takes no kernel.
@pytest.mark.parametrize("kind", ["all", "rms"])
def test_derivatives_of_every_kind(backend, kind):
    """First and second derivatives, forward mode, batched gradients and vmap."""
    require(backend)
    names, center = KINDS[kind]
    x, grad, by = operands((2, 2, 5), torch.float64, names)
    plain, leaf = layer(by, center), x.clone().requires_grad_()

    def op(x):
        return ops.modulated_norm(x, **by, center=center)[0]

    with ops.backend(backend):
        assert torch.autograd.gradcheck(op, (leaf,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(op, (leaf,))
        for ours, theirs in zip(torch.func.jvp(op, (x,), (grad,)), torch.func.jvp(plain, (x,), (grad,)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        batch = torch.stack([x, grad, x + grad])
        torch.testing.assert_close(torch.func.vmap(op)(batch), torch.stack([plain(z) for z in batch]))


def test_only_the_input_gets_a_gradient():
    x, _, by = operands((2, 3, 8), torch.float32, "scale shift")
    y, mean, rstd = ops.modulated_norm(x.requires_grad_(), **by)
    assert y.requires_grad and not mean.requires_grad and not rstd.requires_grad
    by["scale"].requires_grad_()
    with pytest.raises(RuntimeError, match="expected a frozen layer, but a gradient of weight, bias, scale or shift"):
        ops.modulated_norm(x, **by)
    with torch.no_grad():
        ops.modulated_norm(x, **by)


def test_compiles_without_a_graph_break(backend):
    x, grad, by = operands((2, 3, 8), torch.float32, "scale shift")

    def step(x, grad):
        y, grad_x = fused(x.sin(), grad, by)
        return y, grad_x.cos()

    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, grad)
    assert all(torch.equal(g, w) for g, w in zip(got, step(x, grad), strict=True))


# What is refused


def test_what_does_not_fit_is_refused():
    x, grad, by = operands((2, 3, 8), torch.float32, "weight scale shift")
    _, mean, rstd = ops.modulated_norm(x)
    with pytest.raises(ValueError, match=r"x: expected a tensor \(B, ..., C\) with channels, got the shape \(8,\)"):
        ops.modulated_norm(by["weight"])
    with pytest.raises(ValueError, match=r"scale: expected the shape \(2, 8\) on .*, got \(8,\)"):
        ops.modulated_norm(x, scale=by["weight"])
    with pytest.raises(ValueError, match=r"weight: expected the shape \(8,\) on .*, got \(2, 8\)"):
        ops.modulated_norm(x, weight=by["scale"])
    with pytest.raises(
        TypeError, match=r"shift: expected at most float32 with x in torch\.float32, got torch\.float64"
    ):
        ops.modulated_norm(x, shift=by["shift"].double())
    with pytest.raises(TypeError, match=r"x: expected fp16, bf16, fp32 or fp64, got torch\.int32"):
        ops.modulated_norm(x.int())
    with pytest.raises(ValueError, match=r"grad_y: expected x's shape \(2, 3, 8\), got \(1, 3, 8\)"):
        ops.modulated_norm_backward(grad[:1], x, mean, rstd)
    with pytest.raises(ValueError, match=r"mean: expected the shape \(0,\) on .*, got \(2, 3\)"):
        ops.modulated_norm_backward(grad, x, mean, rstd, center=False)
    with pytest.raises(TypeError, match=r"rstd: expected torch\.float32 with x in torch\.float32, got torch\.float64"):
        ops.modulated_norm_backward(grad, x, mean, rstd.double())


def test_the_native_kernels_check_their_arguments():
    require("native", "cpu")
    x = torch.zeros(2, 3, 8)
    mean, rstd = torch.zeros(2, 6)
    library = torch.ops.doodl_fast_native
    wrong = torch.empty(2, 8, 3).transpose(1, 2)
    with pytest.raises(RuntimeError, match="y: expected contiguous memory"):
        library.modulated_norm(wrong, mean, rstd, x, None, None, None, None, 1e-6, True)
    with pytest.raises(RuntimeError, match="mean: expected 0 elements, got 6"):
        library.modulated_norm(torch.empty_like(x), mean, rstd, x, None, None, None, None, 1e-6, False)
    with pytest.raises(RuntimeError, match="scale: expected 16 elements, got 8"):
        library.modulated_norm(torch.empty_like(x), mean, rstd, x, None, None, x[0, 0], None, 1e-6, True)
    with pytest.raises(RuntimeError, match="grad_y: expected 48 elements, got 24"):
        library.modulated_norm_backward(torch.empty_like(x), x[:1], x, mean, rstd, None, None, True)
    with pytest.raises(RuntimeError, match="mean, rstd: expected contiguous memory in the dtype of the arithmetic"):
        library.modulated_norm_backward(torch.empty_like(x), x, x, mean, rstd.double(), None, None, True)


def test_a_gpu_has_tritons_kernels(monkeypatch):
    require("native")
    monkeypatch.setattr(registry, "why_not", lambda name, device_type: None)
    table = registry._completed(registry._table("native", "cuda"), "cuda")
    triton = registry._table("triton", "cuda")["modulated_norm"]
    assert table["modulated_norm"].__code__ is triton.__code__
