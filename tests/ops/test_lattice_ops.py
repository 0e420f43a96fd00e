"""The lattice ops are compared with Python's integers, undone exactly, and give the same bits on every backend."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from conftest import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import BACKENDS, SHAPES, require
from torch import Tensor

from doodl_fast import ops
from doodl_fast.ops import LatticeMixing
from doodl_fast.ops.lattice_coupling_op import limit

INTEGERS = {"int32": torch.int32, "int64": torch.int64}
G = 7.5
C, B = 0.37, {"int32": -0.4 * 2**20, "int64": -0.4 * 2.0**36}
MIXINGS = [
    LatticeMixing(True, 93, 100, 0.07, 93, 100, 0.07),
    LatticeMixing(False, 9301, 10000, 0.0699, 13, 10, -0.2),
    LatticeMixing(True, 1, 1, 0.5),
]


def faults() -> Tensor:
    return torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)


def operands(shape, integer: str, eps: str, guided: bool, words: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    """Returns target, source, their buffers (with room to grow) and eps."""
    generator = torch.Generator().manual_seed(seed)
    largest = 2**27 if integer == "int32" else 2**46

    def draw(*size: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=dtype)

    pair = [draw(*shape, low=-largest, high=largest, dtype=INTEGERS[integer]) for _ in range(2)]
    buffers = [draw(words, *shape, low=0, high=2**31 - 1, dtype=torch.int32) for _ in range(2)]
    for buffer in buffers:
        buffer[-1] %= 2**16
    batch = (2 * shape[0] if guided else shape[0], *shape[1:])
    eps_value = torch.randn(batch, generator=generator, dtype=torch.float64).to(DTYPES[eps])
    return tuple(z.to(DEVICE) for z in (*pair, *buffers, eps_value))


# Comparison with Python's integers


def whole(buffer: Tensor) -> list[int]:
    """Returns the integers that the words of a buffer hold."""
    words = buffer.flatten(1).tolist()
    return [sum(word << (31 * i) for i, word in enumerate(column)) for column in zip(*words, strict=True)]


@settings(max_examples=60)
@given(
    st.integers(-(2**31) + 1, 2**31 - 1),
    st.integers(0, 2**80 - 1),
    st.sampled_from([(93, 100), (1, 10000), (9999, 10000), (7, 10), (13, 10), (10000, 9999)]),
    st.sampled_from(sorted(INTEGERS)),
    st.integers(3, 5),
)
def test_multiplication_with_a_buffer(n, m, factor, integer, words):
    """The op computes the formula of its docstring, n by / over is off by less than a unit, and undo undoes it."""
    by, over = factor
    u, q = m % by, m // by
    expected, v = divmod(n * by + u, over)
    if integer == "int32":
        n = n * over // (10000 * by) if by > over else n  # The result must be in range.
        expected, v = divmod(n * by + u, over)
    target = torch.tensor([[n]], dtype=INTEGERS[integer], device=DEVICE)
    digits = [(m >> (31 * i)) & (2**31 - 1) for i in range(words)]
    buffer = torch.tensor(digits, dtype=torch.int32, device=DEVICE).reshape(-1, 1, 1)
    mixing = LatticeMixing(True, by, over)
    for backend in ("eager", "native", "triton"):
        if ops.why_not(backend, DEVICE.type) is not None:
            continue
        with ops.backend(backend):
            table, zeros = faults(), torch.zeros_like(buffer)
            four = ops.lattice_mix(target, target, buffer, zeros, None, table, 0, mixing)
            assert not table.any()
            assert four[0].item() == expected and whole(four[2]) == [q * over + v]
            assert abs(expected - Fraction(n * by, over)) < 1 + Fraction(by, over)
            back = ops.lattice_mix(*four, None, table, 0, mixing.inverse(), undo=True)
            assert torch.equal(back[0], target) and torch.equal(back[2], buffer)


@pytest.mark.parametrize("integer", INTEGERS)
def test_coupling_adds_the_nearest_integer(backend, integer):
    target, source, *_, eps = operands((2, 3, 5), integer, "fp64", True)
    table = faults()
    out = ops.lattice_coupling(target, source, eps, table, 0, C, B[integer], G)
    u, c = eps.chunk(2)
    exact = source.double() * C + (u + G * (c - u)) * B[integer]
    assert torch.equal(out.long() - target.long(), exact.round().long()) and not table.any()
    halves = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]], dtype=torch.float64, device=DEVICE)
    zero = torch.zeros(1, 5, dtype=INTEGERS[integer], device=DEVICE)
    assert ops.lattice_coupling(zero, zero, halves, table, 0, b=1.0).tolist() == [[0, 2, 2, 0, -2]]  # Ties go to even.


# The inverse, and agreement of the backends


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("eps_dtype", DTYPES)
@pytest.mark.parametrize("integer", INTEGERS)
def test_undone_to_the_bit(backend, integer, eps_dtype, guided):
    *four, eps = operands((2, 3, 5, 7), integer, eps_dtype, guided)
    g, b, table = (G if guided else None), B[integer], faults()
    moved = ops.lattice_coupling(four[0], four[1], eps, table, 0, C, b, g)
    assert torch.equal(ops.lattice_coupling(moved, four[1], eps, table, 0, C, b, g, undo=True), four[0])
    for mixing in MIXINGS:
        there = ops.lattice_mix(*four, eps, table, 1, mixing, C, b, g)
        back = list(ops.lattice_mix(*there, None, table, 1, mixing.inverse(), undo=True))
        back[0] = ops.lattice_coupling(back[0], back[1], eps, table, 1, C, b, g, undo=True)
        assert all(torch.equal(got, want) for got, want in zip(back, four, strict=True))
        assert not torch.equal(there[0], four[0])
    assert not table.any()


def every_result(shape, integer: str, eps_dtype: str, words: int = 4) -> list[Tensor]:
    found = []
    for guided in (False, True):
        *four, eps = operands(shape, integer, eps_dtype, guided, words)
        g, b, table = (G if guided else None), B[integer], faults()
        for undo in (False, True):
            found.append(ops.lattice_coupling(four[0], four[1], eps, table, 0, C, b, g, undo))
            for mixing in MIXINGS:
                found += ops.lattice_mix(*four, eps, table, 1, mixing, C, b, g, undo)
                found += ops.lattice_mix(*four, None, table, 2, mixing, undo=undo)
        found.append(table)
    return found


@pytest.mark.parametrize("eps_dtype", DTYPES)
@pytest.mark.parametrize("integer", INTEGERS)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_every_backend_gives_the_same_bits(name, integer, eps_dtype):
    require(name)
    cases = [*((shape, 4) for shape in SHAPES), ((2, 3, 5), 1), ((1, 9), 7)]
    for shape, words in [((2, 3, 5), 1), ((1, 261), 5)] if name == "triton" else cases:  # Its interpreter is slow.
        with ops.backend("eager"):
            want = every_result(shape, integer, eps_dtype, words)
        with ops.backend(name):
            got = every_result(shape, integer, eps_dtype, words)
        assert all(torch.equal(g, w) and g.dtype == w.dtype for g, w in zip(got, want, strict=True))


def test_more_elements_than_a_thread_takes():
    require("native")
    *four, eps = operands((1, 4, 64, 67), "int32", "fp16", True)
    results = []
    for name in ("eager", "native"):
        with ops.backend(name):
            results.append(ops.lattice_mix(*four, eps, faults(), 0, MIXINGS[0], C, B["int32"], G))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_any_layout_in_contiguous_out(backend):
    *four, eps = operands((2, 3, 4, 5), "int32", "fp32", True)
    strided = [z.transpose(-1, -2).contiguous().transpose(-1, -2) for z in (*four, eps)]
    got = ops.lattice_mix(*strided[:4], strided[4], faults(), 0, MIXINGS[0], C, B["int32"], G)
    want = ops.lattice_mix(*four, eps, faults(), 0, MIXINGS[0], C, B["int32"], G)
    assert all(torch.equal(g, w) and g.is_contiguous() for g, w in zip(got, want, strict=True))


# Faults


@pytest.mark.parametrize("integer", INTEGERS)
def test_range(backend, integer):
    """The limit itself is in range. One more is a fault, noted in this row alone, and changes no other element."""
    dtype = INTEGERS[integer]
    target = torch.tensor([[limit(dtype) - 1, 5]], dtype=dtype, device=DEVICE)
    source, eps, table = torch.zeros_like(target), torch.ones_like(target, dtype=torch.float64), faults()
    for sign in (1, -1):
        out = ops.lattice_coupling(target * sign, source, eps * sign, table, 1, b=1.0)
        assert out.tolist() == [[sign * limit(dtype), sign * 6]] and not table.any()
    for sign in (1, -1):
        table = faults()
        out = ops.lattice_coupling(target * sign, source, eps * sign, table, 1, b=2.0)
        assert out[0, 1] == sign * 7 and table.tolist() == [[0, 0], [1, 0], [0, 0]]
        undone = ops.lattice_coupling(target * sign, source, eps * -sign, table, 2, b=2.0, undo=True)
        assert undone[0, 1] == sign * 7 and table[2].tolist() == [1, 0]


@pytest.mark.parametrize("undo", [False, True])
def test_range_of_the_mixing(backend, undo):
    target = torch.tensor([[2**30, 100]], dtype=torch.int32, device=DEVICE)
    buffer = torch.zeros(2, 1, 2, dtype=torch.int32, device=DEVICE)
    table = faults()
    out = ops.lattice_mix(target, target, buffer, buffer, None, table, 0, LatticeMixing(True, 2, 1), undo=undo)
    assert table.tolist()[0] == [1, 0] and out[0][0, 1] == 200
    out = ops.lattice_mix(target, target, buffer, buffer, None, table, 1, LatticeMixing(False, 1, 1, 1.0), undo=undo)
    assert table.tolist()[1] == [0 if undo else 1, 0] and out[1][0, 1] == (0 if undo else 200)


@pytest.mark.parametrize(
    ("value", "row"),
    [(float("inf"), [1, 1]), (float("-inf"), [1, 1]), (float("nan"), [1, 1]), (1e300, [1, 0]), (2.0**51, [1, 0])],
)
@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_what_is_not_a_number_or_too_large(backend, value, row, mixes, guided):
    target = torch.ones(1, 3, dtype=torch.int64, device=DEVICE)
    eps = torch.tensor([[0.0, value, 0.0]] * (2 if guided else 1), dtype=torch.float64, device=DEVICE)
    g, table, buffer = (1.0 if guided else None), faults(), torch.zeros(1, 1, 3, dtype=torch.int32, device=DEVICE)
    if mixes:
        ops.lattice_mix(target, target, buffer, buffer, eps, table, 1, MIXINGS[0], 0.0, 1.0, g)
    else:
        assert ops.lattice_coupling(target, target, eps, table, 1, 0.0, 1.0, g).tolist() == [[1, 0, 1]]
    assert table.tolist() == [[0, 0], row, [0, 0]]


# Operands that are refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": torch.ones(2, 3)}, TypeError, "target: expected int32 or int64, got torch.float32"),
        ({"source": torch.ones(2, 4, dtype=torch.int32)}, ValueError, r"source: expected target's shape \(2, 3\)"),
        ({"source": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "source: expected target's dtype torch.int32"),
        ({"eps": torch.ones(2, 3, dtype=torch.int32)}, TypeError, "eps: expected fp16, bf16, fp32 or fp64"),
        ({"eps": torch.ones(4, 3)}, ValueError, r"eps: expected the target's shape, \(2, 3\), got \(4, 3\)"),
        ({"faults": torch.zeros(3, dtype=torch.int32)}, ValueError, r"faults: expected \(rows, 2\) of int32"),
        ({"row": 3}, ValueError, "row: expected one of the 3 rows of faults, got 3"),
    ],
)
def test_bad_operands(changes, error, message):
    x = torch.ones(2, 3, dtype=torch.int32, device=DEVICE)
    changes = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in changes.items()}
    arguments = {"target": x, "source": x, "eps": None, "faults": faults(), "row": 0, **changes}
    with pytest.raises(error, match=message):
        ops.lattice_coupling(**arguments)
    buffers = {
        name: torch.zeros(2, 2, 3, dtype=torch.int32, device=DEVICE) for name in ("target_buffer", "source_buffer")
    }
    with pytest.raises(error, match=message):
        ops.lattice_mix(**arguments, **buffers, mixing=MIXINGS[0])


def test_bad_buffers_and_factors():
    x = torch.ones(2, 3, dtype=torch.int32, device=DEVICE)
    buffer = torch.zeros(2, 2, 3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"source_buffer: expected int32 of shape \(words, \*\(2, 3\)\), got torch.int64"
    ):
        ops.lattice_mix(x, x, buffer, buffer.long(), None, faults(), 0, MIXINGS[0])
    with pytest.raises(ValueError, match=r"source_buffer: expected int32 of shape"):
        ops.lattice_mix(x, x, buffer, buffer[:1], None, faults(), 0, MIXINGS[0])
    for factor in (0, 10001):
        with pytest.raises(ValueError, match=f"mixing: expected by and over from 1 to 10000, got {factor}"):
            ops.lattice_mix(x, x, buffer, buffer, None, faults(), 0, LatticeMixing(True, factor, 100))


# Registration with PyTorch


def calls(name: str) -> list[tuple]:
    found = []
    for guided in (False, True):
        t, s, bt, bs, eps = operands((2, 3, 4), "int32", "fp16", guided)
        numbers = (C, B["int32"], G if guided else None)
        if name == "lattice_coupling":
            found += [(t, s, eps, faults(), 1, *numbers, undo) for undo in (False, True)]
        else:
            found += [(t, s, bt, bs, eps, faults(), 1, *mixing, *numbers, False) for mixing in MIXINGS]
    return found


@pytest.mark.parametrize("name", ["lattice_coupling", "lattice_mix"])
def test_opcheck(name, backend):
    for call in calls(name):
        torch.library.opcheck(getattr(torch.ops.doodl_fast, name).default, call)


def test_opcheck_of_the_native_kernels():
    require("native")
    namespace = torch.ops.doodl_fast_native
    for name, outs in (("lattice_coupling", [0]), ("lattice_mix", [0, 1, 2, 3])):
        for call in calls(name):
            call = (*(torch.empty_like(call[i]) for i in outs), *call)
            torch.library.opcheck(getattr(namespace, name).default, call, test_utils=("test_schema", "test_faketensor"))
    x, table = torch.ones(4, dtype=torch.int32, device=DEVICE), faults()
    with pytest.raises(RuntimeError, match="source: expected the target's dtype"):
        namespace.lattice_coupling(x, x, x.long(), None, table, 0, 0.0, 0.0, None, False)
    with pytest.raises(RuntimeError, match="row: expected one of the faults' rows, got 3"):
        namespace.lattice_coupling(x, x, x, None, table, 3, 0.0, 0.0, None, False)
    with pytest.raises(RuntimeError, match="by, over: expected integers from 1 to 10000, got 0 and 1"):
        namespace.lattice_mix(*[x] * 8, None, table, 0, True, 0, 1, 0.0, 1, 1, 0.0, 0.0, 0.0, None, False)


def test_compiles_without_a_graph_break(backend):
    *four, eps = operands((2, 3, 4), "int32", "fp16", True)

    def step(*tensors):
        x = ops.lattice_coupling(tensors[0], tensors[1], tensors[4], tensors[5], 0, C, B["int32"], G)
        return ops.lattice_mix(x, *tensors[1:4], None, tensors[5], 1, MIXINGS[0])

    want = step(*four, eps, faults())
    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*four, eps, faults())
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
