"""The forms of a coupling that solvers other than EDICT need, on every backend: forgotten targets, noise, history."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS
from ops_cases import Linear, check, guided_eps, operands, require, same_bits

from doodl_fast import ops

INSTRUCTIONS = {
    "DDIM: the target is forgotten": (0.0, 0.97, -0.31, True),
    "an output that later steps read": (0.0, 0.0, 1.0, True),
    "latents that are scaled": (0.0, 0.07, 0.0, False),
    "BDIA, O-BELM and Rex": (1.02, -0.03, 0.31, True),
    "a flow": (1.0, 0.0, -0.04, True),
    "noise that is added, and history": (1.0, 0.41, 0.0, False),
}
"""a, c, b, and whether the network is called."""


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_value_and_bits(backend: str, name: str, guided: bool) -> None:
    a, c, b, calls = INSTRUCTIONS[name]
    target, source, eps = operands((2, 3, 5, 7), "fp64" if guided else "fp32", "fp16", guided)
    g = 3.0 if guided and calls else None
    given = (target, source, eps if calls else None, a, c, b, g)
    found = ops.coupling(*given)
    truth = Linear(target) * a + Linear(source) * c
    if calls:
        truth = truth + guided_eps(eps, g) * b
    check(found, truth.value, truth.magnitude)
    with ops.backend("eager"):
        assert same_bits(found, ops.coupling(*given))


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_cotangents_are_autograds_of_the_formula(backend: str, name: str) -> None:
    a, c, b, calls = INSTRUCTIONS[name]
    target, source, eps = (z.requires_grad_() for z in operands((2, 3, 5), "fp64", "fp64", calls))
    plain = a * target + c * source + (b * (eps[:2] + 3.0 * (eps[2:] - eps[:2])) if calls else 0)
    cotangent = operands((2, 3, 5), "fp64", "fp64", False, seed=1)[0]
    expected = torch.autograd.grad(plain, [target, source, eps], cotangent, allow_unused=True)
    g, dtype = (3.0, torch.float64) if calls else (None, None)
    found = ops.coupling_vjp(cotangent, a, c, b, g, None, dtype, c != 0)
    for got, want in zip(found, expected, strict=True):
        if got is None:
            assert want is None or not want.any()
        else:
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, name: str) -> None:
    require(backend)
    a, c, b, calls = INSTRUCTIONS[name]
    target, source, eps = (z.requires_grad_() for z in operands((2, 3, 5), "fp32", "fp32", calls))
    with ops.backend(backend):
        torch.library.opcheck(
            torch.ops.doodl_fast.coupling.default,
            (target, source, eps if calls else None, a, c, b, 3.0 if calls else None),
        )
