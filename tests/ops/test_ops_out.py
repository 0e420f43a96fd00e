"""`out=` writes the same bits into memory of the caller, and refuses memory that does not fit."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, DTYPES
from ops_cases import LAYOUTS, operands, same_bits

from doodl_fast import ops

MIX = ops.Mixing(True, 0.93, 0.07, 0.93, 0.07)
NUMBERS = (0.98, 0.0, -0.12, 7.5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_in_given_memory(backend, dtype, layout):
    x, y, eps = (LAYOUTS[layout](z) for z in operands((2, 4, 5, 6), dtype, "fp16", True))
    want = ops.coupling(x, y, eps, *NUMBERS)
    out = torch.full_like(want, 7)
    assert ops.coupling(x, y, eps, *NUMBERS, out=out) is out
    assert same_bits(out, want)
    pair = ops.coupling_mix(x, y, eps, MIX, *NUMBERS)
    given = tuple(torch.full_like(z, 7) for z in pair)
    got = ops.coupling_mix(x, y, eps, MIX, *NUMBERS, out=given)
    assert got[0] is given[0] and got[1] is given[1]
    assert all(same_bits(g, w) for g, w in zip(given, pair, strict=True))


def test_compiled():
    x, y, eps = operands((2, 4, 5, 6), "fp32", "fp32", True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x, y, eps, one, first, second):
        ops.coupling(x, y, eps, *NUMBERS, out=one)
        return ops.coupling_mix(x, y, eps, MIX, *NUMBERS, out=(first, second))

    outs = [torch.full_like(x, 7) for _ in range(3)]
    with torch.no_grad():
        both(x, y, eps, *outs)
    want = [ops.coupling(x, y, eps, *NUMBERS), *ops.coupling_mix(x, y, eps, MIX, *NUMBERS)]
    assert all(same_bits(g, w) for g, w in zip(outs, want, strict=True))


def test_refusals():
    x, y, eps = operands((2, 4, 5, 6), "fp32", "fp32", True)
    for out, message in (
        (x.new_empty(2, 4), r"out: expected target's shape \(2, 4, 5, 6\), got \(2, 4\)"),
        (x.half(), r"out: expected target's dtype torch.float32, got torch.float16"),
        (torch.empty_like(x, memory_format=torch.channels_last), "out: expected dense memory in torch.contiguous"),
        (x, "out: expected memory of its own"),
        (eps[:2], "out: expected memory of its own"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ops.coupling(x, y, eps, *NUMBERS, out=out)
    once = torch.empty_like(x)
    with pytest.raises(ValueError, match=r"out\[1\]: expected memory of its own"):
        ops.coupling_mix(x, y, eps, MIX, *NUMBERS, out=(once, once))
    with pytest.raises(ValueError, match="out: expected no gradient to be wanted"):
        ops.coupling(x.requires_grad_(), y, eps, *NUMBERS, out=once)
    with torch.no_grad():
        ops.coupling(x, y, eps, *NUMBERS, out=once)


def test_empty():
    x = torch.empty(0, 4, device=DEVICE)
    out = torch.empty_like(x)
    assert ops.coupling(x, None, None, 2.0, out=out) is out
