"""Every op is tested under forward-mode differentiation, torch.func's transforms and for higher derivatives.

The results on every backend are compared with a formula written here in plain torch, or with finite differences.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.autograd import forward_ad

from doodl_fast import ops

A, C, B, G = 0.9, -0.3, 0.4, 3.0
MIX = ops.Mixing(False, 0.93, 0.07, 0.8, 0.2)
SCALE = 0.25
HALF = torch.float16


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def guided(e: Tensor) -> Tensor:
    u, c = e[: len(e) // 2], e[len(e) // 2 :]
    return (1 - G) * u + G * c


def plain_coupling(t, s, e):
    return A * t + C * s + B * guided(e)


def plain_mix(t, s):
    s = MIX.a0 * s + MIX.c0 * t
    return MIX.a1 * t + MIX.c1 * s, s


def plain_mix_inverse(t, s):
    t = (t - MIX.c1 * s) / MIX.a1
    return t, (s - MIX.c0 * t) / MIX.a0


def plain_vjp(grad):
    return A * grad, C * grad, torch.cat([(1 - G) * B * SCALE * grad, G * B * SCALE * grad])


def plain_mix_vjp(gt, gs):
    t, s, e = torch.zeros_like(gt), torch.zeros_like(gt), torch.cat([gt, gt])
    _, pull = torch.func.vjp(lambda t, s, e: plain_mix(plain_coupling(t, s, e), s), t, s, e)
    to_t, to_s, to_e = pull((gt, gs))
    return to_t, to_s, SCALE * to_e


def plain_update(x, y, mx, my, gx, gy, noise):
    results = [(z - (0.9 * m + 0.5 * g) + 0.1 * noise, 0.9 * m + 0.5 * g) for z, m, g in ((x, mx, gx), (y, my, gy))]
    ends = [z * (2.0 / z.flatten(1).norm(dim=1)).reshape(-1, 1) for z, _ in results]
    return (*ends, results[0][1], results[1][1])


def update(x, y, mx, my, gx, gy, noise):
    starts = [torch.full((2,), 2.0, dtype=x.dtype, device=DEVICE)] * 2
    ends, momenta = ops.latent_update((x, y), (mx, my), (gx, gy), noise, starts, momentum=0.9, sigma=0.1)
    return *ends, *momenta


def scale() -> Tensor:
    return torch.tensor(SCALE, dtype=torch.float64, device=DEVICE)


T, S, E = (2, 3), (2, 3), (4, 3)
CASES = {
    "coupling": (lambda t, s, e: ops.coupling(t, s, e, A, C, B, G), plain_coupling, (T, S, E)),
    "coupling_inverse": (
        lambda t, s, e: ops.coupling_inverse(t, s, e, A, C, B, G),
        lambda t, s, e: (t - C * s - B * guided(e)) / A,
        (T, S, E),
    ),
    "coupling_mix": (
        lambda t, s, e: ops.coupling_mix(t, s, e, MIX, A, C, B, G),
        lambda t, s, e: plain_mix(plain_coupling(t, s, e), s),
        (T, S, E),
    ),
    "mix": (lambda t, s: ops.mix(t, s, MIX), plain_mix, (T, S)),
    "mix_inverse": (lambda t, s: ops.mix_inverse(t, s, MIX), plain_mix_inverse, (T, S)),
    "coupling_vjp": (lambda g: ops.coupling_vjp(g, A, C, B, G, scale(), torch.float64, True), plain_vjp, (T,)),
    "coupling_mix_vjp": (
        lambda gt, gs: ops.coupling_mix_vjp(gt, gs, MIX, A, C, B, G, scale(), torch.float64),
        plain_mix_vjp,
        (T, S),
    ),
    "latent_update": (update, plain_update, (T,) * 7),
}


def case(name: str, grad: bool = False):
    op, plain, shapes = CASES[name]
    inputs = tuple(drawn(*shape, seed=i).requires_grad_(grad) for i, shape in enumerate(shapes))
    return op, plain, inputs


def close(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def nonlinear(function):
    """Returns a function with a scalar result that has second derivatives, from one of the ops."""

    def scalar(*inputs):
        results = function(*inputs)
        results = (results,) if isinstance(results, Tensor) else results
        return sum(result.sin().sum() for result in results)

    return scalar


@pytest.mark.parametrize("name", CASES)
def test_forward_mode(backend, name):
    op, plain, inputs = case(name)
    tangents = tuple(drawn(*z.shape, seed=50 + i) for i, z in enumerate(inputs))
    want = torch.func.jvp(plain, inputs, tangents)
    close(torch.func.jvp(op, inputs, tangents), want)
    close(torch.autograd.functional.jvp(op, inputs, tangents), want)
    with forward_ad.dual_level():
        got = op(*(forward_ad.make_dual(z, t) for z, t in zip(inputs, tangents, strict=True)))
        got = (got,) if isinstance(got, Tensor) else got
        found = [forward_ad.unpack_dual(out).tangent for out in got]
    want = (want[1],) if isinstance(want[1], Tensor) else want[1]
    close(found, list(want))


@pytest.mark.parametrize("name", CASES)
def test_func_grad_vmap_and_jacobians(backend, name):
    op, plain, inputs = case(name)
    every = tuple(range(len(inputs)))
    close(torch.func.grad(nonlinear(op), every)(*inputs), torch.func.grad(nonlinear(plain), every)(*inputs))
    batched = tuple(torch.stack([z, 2 * z, z + 1]) for z in inputs)
    close(torch.func.vmap(op)(*batched), torch.func.vmap(plain)(*batched))
    for vectorize in (False, True):
        close(
            torch.autograd.functional.jacobian(op, inputs, vectorize=vectorize),
            torch.autograd.functional.jacobian(plain, inputs),
        )
    close(torch.func.jacfwd(op)(*inputs), torch.func.jacrev(plain)(*inputs))
    close(torch.func.hessian(nonlinear(op))(*inputs), torch.func.hessian(nonlinear(plain))(*inputs))


@pytest.mark.parametrize("name", CASES)
def test_higher_derivatives(backend, name):
    op, plain, inputs = case(name, grad=True)
    assert torch.autograd.gradcheck(op, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(op, inputs)
    detached = tuple(z.detach() for z in inputs)
    tangents = tuple(drawn(*z.shape, seed=50 + i) for i, z in enumerate(inputs))
    for function in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        close(function(nonlinear(op), detached, tangents), function(nonlinear(plain), detached, tangents))


def test_batched_gradients(backend):
    """The network is in fp16 as well, whose cotangents are rounded only once."""
    x, eps = drawn(2, 3).requires_grad_(), drawn(2, 3, seed=1).half().requires_grad_()
    out = ops.coupling(x, None, eps, A, 0.0, B)
    cotangents = drawn(5, 2, 3)
    got, to_eps = torch.autograd.grad(out, (x, eps), cotangents, is_grads_batched=True)
    close(got, A * cotangents)
    assert torch.equal(to_eps, torch.stack([ops.coupling_vjp(z, A, 0.0, B, None, None, HALF)[2] for z in cotangents]))


@pytest.mark.parametrize("name", CASES)
def test_a_transformed_call_has_the_bits_of_a_plain_one(backend, name):
    """This includes float64 latents with an fp16 network, whose results are rounded only once."""
    op, _, inputs = case(name)
    got, _ = torch.func.jvp(op, inputs, inputs)
    assert all(torch.equal(g, w) for g, w in zip(got, op(*inputs), strict=True))
    grad, tangent = drawn(40, 50, seed=1), drawn(40, 50, seed=2)

    def to_eps(grad):
        return ops.coupling_vjp(grad, A, C, B, G, None, torch.float16)[2]

    got, derivative = torch.func.jvp(to_eps, (grad,), (tangent,))
    assert torch.equal(got, to_eps(grad))
    torch.testing.assert_close(derivative, to_eps(tangent), rtol=2e-3, atol=1e-4)
    (back,) = torch.autograd.grad(to_eps(grad.requires_grad_()).double().sum(), grad)
    torch.testing.assert_close(back, torch.full_like(back, B), rtol=1e-3, atol=1e-3)
    batched = torch.func.vmap(to_eps)(torch.stack([grad.detach(), tangent]))
    assert torch.equal(batched[1], to_eps(tangent))


def test_the_registered_ops_refuse_a_tangent(backend):
    x = drawn(2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=r"has no forward-mode derivative; call doodl_fast\.ops"):
            torch.ops.doodl_fast.coupling(dual, None, None, A, 0.0, 0.0, None)
        n = torch.ones(2, 3, dtype=torch.int32, device=DEVICE)
        faults = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
        with pytest.raises(RuntimeError, match=r"doodl_fast\.lattice_coupling: the registered op has no forward-mode"):
            torch.ops.doodl_fast.lattice_coupling(n, n, dual, faults, 0, 0.5, 2.0, None, False)
        with pytest.raises(ValueError, match="out: expected None under forward-mode"):
            ops.coupling(dual, None, None, A, out=torch.empty_like(x))


def lattice_calls(eps: Tensor) -> list:
    n = torch.ones(2, 3, dtype=torch.int32, device=DEVICE)
    buffer, faults = (torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in ((1, 2, 3), (1, 2)))
    mixing = ops.LatticeMixing(True)
    return [
        lambda: ops.lattice_coupling(n, n, eps, faults, 0, 0.5, 2.0),
        lambda: ops.lattice_mix(n, n, buffer, buffer, eps, faults, 0, mixing, 0.5, 2.0),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_the_lattice_ops_have_no_derivative(which):
    eps = torch.ones(2, 3, device=DEVICE)
    message = r"lattice_.*: expected tensors without a gradient or a tangent, as rounding to integers has no derivative"
    with pytest.raises(RuntimeError, match=message):
        lattice_calls(eps.clone().requires_grad_())[which]()
    with torch.no_grad():
        lattice_calls(eps.clone().requires_grad_())[which]()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        lattice_calls(forward_ad.make_dual(eps, eps))[which]()
    with pytest.raises(RuntimeError, match=r"lattice_.*: expected a call outside torch.func"):
        torch.func.vmap(lambda e: lattice_calls(e)[which]())(eps[None])
