"""Programs on more than two latents, and couplings that forget their target: the engine against plain autograd."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from torch import Tensor

from doodl_fast.chain.chain import Chain
from doodl_fast.chain.program import Coupling

# A two-step method with noise: latent 0 is the start, 1 and 2 take turns, 3 is noise.
FORGETTING = (
    Coupling(1, 0.0, 0.9, 0.3, 0, 0.5, source=0),
    Coupling(2, 0.0, 0.8, -0.2, 1, 1.5, source=1),
    Coupling(2, 1.0, 0.1, 0.0, 1, None, source=0),
    Coupling(2, 1.0, 0.5, 0.0, 1, None, source=3),
    Coupling(1, 0.0, 1.1, 0.4, 2, 2.5, source=2),
)
KEEPING = (Coupling(1, 0.7, 0.2, 0.3, 0, 0.5, source=2), Coupling(2, 1.1, 0.4, -0.2, 1, 1.5, source=0))


def network(x: Tensor, t: float, tensors=None, latents_dtype=None) -> Tensor:
    return torch.sin(x * (1 + t)) + 0.1 * x**2


def by_hand(program: tuple[Coupling, ...], latents: list[Tensor]) -> list[Tensor]:
    values = list(latents)
    for k in program:
        source = values[k.source]
        value = network(source, k.tag) if k.b else 0.0
        values[k.target] = k.a * values[k.target] + k.c * source + k.b * value
    return values


CASES = {
    **{f"forgetting-{memory}": (FORGETTING, memory) for memory in ("checkpoint", "naive")},
    **{f"keeping-{memory}": (KEEPING, memory) for memory in ("checkpoint", 1, "reversible", "naive")},
}


@pytest.mark.parametrize(("program", "memory"), CASES.values(), ids=CASES)
def test_gradient_is_that_of_plain_autograd(program, memory):
    generator = torch.Generator().manual_seed(0)
    count = 1 + max(max(k.target, k.source) for k in program)
    latents = [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    weights = [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(count)]
    chain = Chain(network, program, memory)
    ends = chain.run(*latents)
    expected = by_hand(program, latents)
    for end, want in zip(ends, expected, strict=True):
        torch.testing.assert_close(end, want)
    loss = sum((end * weight).sum() for end, weight in zip(ends, weights, strict=True))
    want = sum((end * weight).sum() for end, weight in zip(expected, weights, strict=True))
    gradients = torch.autograd.grad(loss, latents, allow_unused=True, materialize_grads=True)
    truth = torch.autograd.grad(want, latents, allow_unused=True, materialize_grads=True)
    for gradient, true in zip(gradients, truth, strict=True):
        assert relative(gradient, true) < 1e-14 if true.any() else not gradient.any()


def test_what_a_program_that_forgets_refuses():
    with pytest.raises(ValueError, match=r'memory: "reversible" undoes couplings, .* use "checkpoint" or "auto"'):
        Chain(network, FORGETTING, "reversible")
    with pytest.raises(ValueError, match=r"memory: 2 undoes couplings"):
        Chain(network, FORGETTING, 2)
    x = torch.zeros(1, 3, dtype=torch.float64)
    chain = Chain(network, FORGETTING[:1])
    assert not chain.is_invertible
    with pytest.raises(ValueError, match=r"inverse: Chain cannot be inverted, .* such as doodl_fast.EDICT"):
        chain.inverse(x, x)
    with pytest.raises(ValueError, match=r"latents: expected 4 tensors, .* got 2"):
        Chain(network, FORGETTING).run(x, x)


def test_auto_stores_no_states_of_a_program_that_forgets():
    latents = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    chain = Chain(network, FORGETTING, "auto", memory_budget="1MiB")
    options = {"allow_unused": True, "materialize_grads": True}
    truth = torch.autograd.grad(by_hand(FORGETTING, latents)[1].sum(), latents, **options)
    got = torch.autograd.grad(chain.run(*latents)[1].sum(), latents, **options)
    assert chain.plan.states == "checkpoint"
    for gradient, true in zip(got, truth, strict=True):
        assert relative(gradient, true) < 1e-14 if true.any() else not gradient.any()
