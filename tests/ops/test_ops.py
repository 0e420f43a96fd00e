"""Every op, on every backend, in every dtype and layout, is compared with float64, and the backends bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    LAYOUTS,
    SHAPES,
    STATE_EPS,
    Linear,
    check,
    guided_eps,
    operands,
    require,
    same_bits,
    update,
)
from torch import Tensor

from doodl_fast import ops

A, C, B, G = 0.9123, -0.31, 0.4567, 7.5
MIXINGS = [
    ops.Mixing(True, 0.93, 0.07, 0.93, 0.07),
    ops.Mixing(False, 0.93, 0.07, 0.93, 0.07),
    ops.Mixing(True, 0.7, 0.0, 1.0, -0.3),
    ops.Mixing(True, 0.93, 0.07, 0.93, 0.07).inverse(),
]


def mixed(first: Linear, second: Linear, m: ops.Mixing) -> tuple[Linear, Linear]:
    first = first * m.a0 + second * m.c0
    return first, second * m.a1 + first * m.c1


# Comparison with float64


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("state", "eps_dtype"), STATE_EPS)
def test_coupling(backend, state, eps_dtype, guided):
    target, source, eps = operands((2, 4, 9, 13), state, eps_dtype, guided)
    g = G if guided else None
    truth = Linear(target) * A + Linear(source) * C + guided_eps(eps, g) * B
    check(ops.coupling(target, source, eps, A, C, B, g), truth.value, truth.magnitude)
    truth = Linear(target) * A + guided_eps(eps, g) * B
    check(ops.coupling(target, None, eps, A, 0.0, B, g), truth.value, truth.magnitude)
    truth = Linear(target) * A + Linear(source) * C
    check(ops.coupling(target, source, None, A, C), truth.value, truth.magnitude)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("state", "eps_dtype"), STATE_EPS)
def test_coupling_inverse(backend, state, eps_dtype, guided):
    target, source, eps = operands((2, 4, 9, 13), state, eps_dtype, guided)
    g = G if guided else None
    truth = (Linear(target) + Linear(source) * -C + guided_eps(eps, g) * -B) * (1 / A)
    check(ops.coupling_inverse(target, source, eps, A, C, B, g), truth.value, truth.magnitude)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("state", "eps_dtype"), STATE_EPS)
def test_coupling_vjp(backend, state, eps_dtype, guided):
    grad, *_ = operands((2, 4, 9, 13), state, eps_dtype, guided)
    g, scale = (G if guided else None), torch.tensor(2.0**-3, dtype=grad.dtype, device=DEVICE)
    to_target, to_source, to_eps = ops.coupling_vjp(grad, A, C, B, g, scale, DTYPES[eps_dtype], want_source=True)
    exact = Linear(grad)
    check(to_target, (exact * A).value, (exact * A).magnitude)
    check(to_source, (exact * C).value, (exact * C).magnitude)
    assert to_eps.dtype == DTYPES[eps_dtype]
    halves = [exact * (B / 8)] if g is None else [exact * (B / 8) + exact * (-g * B / 8), exact * (g * B / 8)]
    for got, want in zip(to_eps.split(2), halves, strict=True):
        check(got, want.value, want.magnitude)
    assert ops.coupling_vjp(grad, A)[1:] == (None, None)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("state", "eps_dtype"), STATE_EPS)
def test_coupling_mix(backend, state, eps_dtype, guided, mixing):
    target, source, eps = operands((2, 4, 5, 13), state, eps_dtype, guided)
    g = G if guided else None
    middle = Linear(target) * A + Linear(source) * C + guided_eps(eps, g) * B
    first, second = mixed(*((middle, Linear(source)) if mixing.target_first else (Linear(source), middle)), mixing)
    want = (first, second) if mixing.target_first else (second, first)
    for got, truth in zip(ops.coupling_mix(target, source, eps, mixing, A, C, B, g), want, strict=True):
        check(got, truth.value, truth.magnitude)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("state", "eps_dtype"), STATE_EPS)
def test_coupling_mix_vjp(backend, state, eps_dtype, guided, mixing):
    """The results satisfy <vjp(w), z> = <w, op(z)>, where both sides are computed from them in float64."""
    wt, ws, _ = operands((2, 4, 5, 13), state, eps_dtype, guided)
    zt, zs, ze = operands((2, 4, 5, 13), "fp64", "fp64", guided, seed=1)
    g, scale = (G if guided else None), torch.tensor(0.25, dtype=wt.dtype, device=DEVICE)
    gt, gs, ge = ops.coupling_mix_vjp(wt, ws, mixing, A, C, B, g, scale, DTYPES[eps_dtype])
    assert gt.dtype == gs.dtype == wt.dtype and ge.dtype == DTYPES[eps_dtype]
    with ops.backend("eager"):
        ot, os = ops.coupling_mix(zt, zs, ze, mixing, A, C, B, g)
    left = [gt.double() * zt, gs.double() * zs, ge.double() * ze * 4]
    right = [wt.double() * ot, ws.double() * os]
    error = abs(sum(part.sum() for part in left) - sum(part.sum() for part in right))
    magnitude = sum(part.abs().sum() for part in left + right)
    assert error <= 2 * max(torch.finfo(wt.dtype).eps, torch.finfo(ge.dtype).eps) * magnitude


def test_mix_and_its_inverse(backend):
    x, y, _ = operands((2, 3, 5), "fp64", "fp64", False)
    for mixing in MIXINGS:
        for got, want in zip(ops.mix_inverse(*ops.mix(x, y, mixing), mixing), (x, y), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-13)


# Agreement of the backends bit for bit


def every_result(state: str, eps_dtype: str, shape: tuple[int, ...], layout=None, seed: int = 0) -> list[Tensor]:
    found: list[Tensor | None] = []
    for guided in (False, True):
        target, source, eps = operands(shape, state, eps_dtype, guided, seed)
        if layout is not None:
            target, source, eps = (layout(z) for z in (target, source, eps))
        g = G if guided else None
        scale = torch.tensor(2.0**-5, dtype=target.dtype, device=DEVICE)
        found += [ops.coupling(target, source, eps, A, C, B, g), ops.coupling(target, None, eps, 1.0, 0.0, B, g)]
        found += ops.coupling_vjp(target, A, C, B, g, scale, eps.dtype, want_source=True)
        for mixing in MIXINGS:
            found += ops.coupling_mix(target, source, eps, mixing, A, 0.0, B, g)
            found += ops.coupling_mix(target, source, None, mixing, A, C)
            found += ops.coupling_mix_vjp(target, source, mixing, A, C, B, g, scale, eps.dtype)
    return [result for result in found if result is not None]


@pytest.mark.parametrize(("state", "eps_dtype"), STATE_EPS)
def test_backends_agree_to_the_last_bit(backend, state, eps_dtype):
    got = every_result(state, eps_dtype, (2, 4, 5, 13))
    with ops.backend("eager"):
        want = every_result(state, eps_dtype, (2, 4, 5, 13))
    assert len(got) == len(want) and all(same_bits(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    """Operands of any strides give the same bits as contiguous ones, and channels_last is kept."""
    got = every_result("fp32", "fp16", (2, 4, 5, 6), LAYOUTS[layout])
    want = every_result("fp32", "fp16", (2, 4, 5, 6))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
        assert g.is_contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )


def test_operands_of_different_layouts(backend):
    target, source, eps = operands((2, 4, 5, 6), "fp32", "fp32", True)
    want = ops.coupling(target, source, eps, A, C, B, G)
    for layouts in itertools.product(LAYOUTS.values(), repeat=3):
        got = ops.coupling(*(layout(z) for layout, z in zip(layouts, (target, source, eps), strict=True)), A, C, B, G)
        assert torch.equal(got, want)
    expanded = source[:1, :1].expand(2, 4, 5, 6)
    assert torch.equal(ops.coupling(target, expanded, None, A, C), ops.coupling(target, expanded.clone(), None, A, C))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape):
    got = every_result("fp64", "bf16", shape)
    with ops.backend("eager"):
        want = every_result("fp64", "bf16", shape)
    assert all(same_bits(g, w) for g, w in zip(got, want, strict=True))
    two, three = torch.tensor(2.0, device=DEVICE), torch.tensor(3.0, device=DEVICE)
    assert ops.coupling(two, None, three, 2.0, 0.0, 0.5).item() == 5.5


def test_large_enough_for_several_threads(backend):
    """The size is more than one thread takes on the CPU, and it is odd."""
    size = 5000 if backend == "triton" else 150_001
    x, y, eps = operands((1, size), "fp32", "fp32", True)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([*ops.coupling_mix(x, y, eps, MIXINGS[0], A, C, B, G), *update(x, y, seed=3)])
    finally:
        torch.set_num_threads(threads)
    with ops.backend("eager"):
        assert torch.equal(results[0][0], ops.coupling_mix(x, y, eps, MIXINGS[0], A, C, B, G)[0])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_special_values(backend):
    """Signed zeros, infinities, NaN, subnormals, overflow of fp16 and ties give the bits of the eager kernel."""
    values = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 6e-8, 65519.9, 65520.0, 3e38, 1.00048828125, 1e-300],
        dtype=torch.float64,
        device=DEVICE,
    )
    grid = torch.cartesian_prod(values, values)
    for state, eps_dtype in STATE_EPS:
        target, eps = grid[None, :, 0].to(DTYPES[state]), grid[None, :, 1].to(DTYPES[eps_dtype])
        results = []
        for name in (backend, "eager"):
            with ops.backend(name):
                results.append(
                    [
                        ops.coupling(target, target.flip(1), eps, 1.0, 0.5, 1.0),
                        *ops.coupling_vjp(target, 1.0, 0.0, 1.0, None, None, eps.dtype)[::2],
                        *ops.coupling_mix(target, target.flip(1), eps, MIXINGS[2], 1.0, 0.0, 1.0),
                        *ops.coupling_mix_vjp(target, target.flip(1), MIXINGS[2], 1.0, 0.0, 1.0, 3.0, None, eps.dtype),
                    ]
                )
        assert all(same_bits(got, want) for got, want in zip(*results, strict=True)), (state, eps_dtype)


def test_fp64_is_rounded_once(backend):
    """A float64 just above the middle of two fp16 numbers is rounded up, as it is not by way of float32."""
    for dtype, above in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        numbers = [[1 + above + 2.0**-40, 1 + above, -1 - above - 2.0**-40]]
        grad = torch.tensor(numbers, dtype=torch.float64, device=DEVICE)
        got = ops.coupling_vjp(grad, 1.0, 0.0, 1.0, eps_dtype=dtype)[2]
        up = 1 + 2 * above
        assert got.tolist() == [[up, 1.0, -up]]


def test_no_fused_multiply_add(backend):
    """In `a t + c s` the product is rounded: the result is exactly zero, and 2^-46 with a fused multiply-add."""
    number = 1 + 2.0**-12
    target, source = (torch.tensor([[value] * 9], device=DEVICE) for value in (number, number * number))
    assert float(source[0, 0]) != number * number
    assert ops.coupling(target, source, None, number, -1.0).abs().max() == 0
    mixing = ops.Mixing(True, number, -1.0, 1.0, 0.0)
    assert ops.coupling_mix(target, source, None, mixing)[0].abs().max() == 0


def drops_signs_of_zero() -> bool:
    """Whether this is the interpreter of Triton 3.6, which takes a float argument of -0.0 for 0."""
    if DEVICE.type != "cpu":
        return False
    from triton.runtime.interpreter import _implicit_cvt

    return isinstance(_implicit_cvt(-0.0), float)


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("tiny", [1e-237, 2.0**-150, -(2.0**-150), 2.0**-149, 1e-45])
def test_coefficients_that_vanish_in_fp32(backend, tiny, zero):
    """The term of a coefficient that is rounded to zero is left out, even if its operand is infinite."""
    if backend == "triton" and math.copysign(1, zero) < 0 and drops_signs_of_zero():
        pytest.skip("this Triton's interpreter has no argument of -0.0; its compiler has")
    x = torch.tensor([[1.5, -0.0, -2.0, math.inf]], device=DEVICE)
    y = torch.tensor([[-1.0, -3.0, -0.0, 2.0]], device=DEVICE)
    results = []
    for name in (backend, "eager"):
        with ops.backend(name):
            results.append([])
            for target_first in (True, False):
                mixing = ops.Mixing(target_first, 1.0, tiny, zero, tiny)
                results[-1] += ops.coupling_mix(x, y, None, mixing)
                results[-1] += ops.coupling_mix_vjp(x, y, mixing, 1.0, tiny)[:2]
    assert all(same_bits(got, want) for got, want in zip(*results, strict=True))
    assert not torch.isnan(results[0][1]).any()  # With the term, 0 times infinity would be NaN.


def test_deterministic(backend):
    assert all(
        same_bits(a, b)
        for a, b in zip(
            every_result("fp32", "fp16", (2, 4, 16, 16)), every_result("fp32", "fp16", (2, 4, 16, 16)), strict=True
        )
    )


def test_operands_are_left_alone(backend):
    tensors = operands((2, 4, 5), "fp32", "fp16", True)
    before = [z.clone() for z in tensors]
    target, source, eps = tensors
    ops.coupling(target, source, eps, A, C, B, G)
    ops.coupling_mix(target, source, eps, MIXINGS[0], A, C, B, G)
    update(target, source)
    assert all(torch.equal(z, b) for z, b in zip(tensors, before, strict=True))
    out = ops.coupling(target)
    assert torch.equal(out, target) and out.data_ptr() != target.data_ptr()


floats = st.floats(-3, 3, allow_nan=False)


@settings(max_examples=25)
@given(floats, floats, floats, st.none() | floats, st.integers(1, 70), st.sampled_from(STATE_EPS), st.integers(0, 99))
def test_any_coefficients_agree(a, c, b, g, size, dtypes, seed):
    for name in ("native",):
        require(name)
        target, source, eps = operands((1, size), *dtypes, g is not None, seed)
        results = []
        for used in (name, "eager"):
            with ops.backend(used):
                results.append(
                    [
                        ops.coupling(target, source, eps, a, c, b, g),
                        *ops.coupling_mix(target, source, eps, ops.Mixing(seed % 2 == 0, a, b, c, a), a, c, b, g),
                    ]
                )
        assert all(same_bits(got, want) for got, want in zip(*results, strict=True))


# Operands that are refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3, dtype=torch.int32),), "target: expected fp16"),
        ((torch.ones(2, 3), torch.ones(3, 2)), r"source: expected target's shape \(2, 3\), got \(3, 2\)"),
        ((torch.ones(2, 3), torch.ones(2, 3).half()), "source: expected target's dtype"),
        ((torch.ones(2, 3), None, torch.ones(4, 3)), "eps: expected the target's shape"),
        ((torch.ones(2, 3), None, torch.ones(2, 3), 1.0, 0.0, 1.0, 7.5), r"eps: .*\(4, 3\), got \(2, 3\)"),
        ((torch.ones(2, 3), None, torch.ones(3, 2), 1.0, 0.0, 1.0), "eps: expected the target's shape"),
        ((torch.ones(2, 3), None, None, 1.0, 0.0, 1.0, 2.0), "g: expected None"),
        ((torch.ones(2, 3), torch.ones(2, 3, device="meta")), "source: expected target's device"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.coupling(*arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.doodl_fast.coupling(*arguments, *(None, None, 1.0, 0.0, 0.0, None)[len(arguments) - 1 :])


def test_refused_elsewhere():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="a: expected a number other than 0"):
        ops.coupling_inverse(x, a=0.0)
    with pytest.raises(ValueError, match="scale: expected a 0-dim tensor"):
        ops.coupling_vjp(x, scale=torch.ones(1), eps_dtype=torch.float32)
    with pytest.raises(TypeError, match="latents: expected float32 or float64"):
        update(x.half(), x.half())
    with pytest.raises(ValueError, match="start_norms: expected one for each of 2 samples"):
        update(x, x, None, [torch.ones(1), torch.ones(1)])
    with pytest.raises(ValueError, match="noise: expected x's shape"):
        update(x, x, torch.ones(3, 2))
