"""The function in a chain's couplings: defaults of `Evaluator`, subclasses, objects that only have its methods."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import TinyNet, conditions, latents, pull, relative, tiny_chain
from tolerances import FP64

from doodl_fast.chain.chain import Chain
from doodl_fast.chain.evaluator import Evaluator, as_evaluator, raw_output
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser

PROGRAM = [Coupling(step % 2, b=0.3, step=step, tag=step) for step in range(4)]


class Sine(Evaluator):
    def __call__(self, x, t, tensors=None, latents_dtype=None):
        return torch.sin(x + t)


class Duck:
    """Has `__call__` and one method of eight."""

    entered = 0

    def __call__(self, x, t, tensors=None, latents_dtype=None):
        return torch.sin(x + t)

    def running(self):
        self.entered += 1
        return contextlib.nullcontext()


@pytest.mark.parametrize("memory", ["checkpoint", 2, "reversible", "auto"])
@pytest.mark.parametrize("make", [Sine, Duck])
def test_a_call_alone_is_enough(make, memory):
    x, y = latents(1, 3, 4, grad=True)
    expected = pull(Chain(Sine(), PROGRAM, "naive")(x, y), [x, y])
    function = make()
    for got, want in zip(pull(Chain(function, PROGRAM, memory)(x, y), [x, y]), expected, strict=True):
        assert relative(got, want) < FP64
    assert not isinstance(function, Duck) or function.entered >= 2  # forwards and backwards


def test_defaults():
    sine, (x, _) = Sine(), latents(1, 3, 4)
    value, g = sine.raw(x, 2)
    assert torch.equal(value, torch.sin(x + 2)) and g is None
    assert sine.tensors() == () and sine.weights() == () and sine.compute_dtype(torch.float16) == torch.float16
    assert sine.for_vjp() is None and sine.for_blocks() is None and not sine.insists_on_vjps


def test_only_functions_are_evaluators():
    assert as_evaluator(sine := Sine()) is sine
    with pytest.raises(TypeError, match="evaluator: expected an Evaluator, or an object with its methods, got int"):
        Chain(3, PROGRAM)
    with pytest.raises(TypeError, match="abstract"):
        type("Nothing", (Evaluator,), {})()


class Doubled(Denoiser):
    """Overrides the call alone, so `Denoiser.raw` must not be used in its place."""

    def __call__(self, *args):
        return 2 * super().__call__(*args)


class Shouting(Doubled):
    """Overrides nothing, two classes below the call."""


class Halved(Doubled):
    """Defines both again."""

    def __call__(self, *args):
        return super().__call__(*args) / 2

    def raw(self, *args):
        return Denoiser.raw(self, *args)


@pytest.mark.parametrize(("cls", "factor", "uses_raw"), [(Doubled, 2, False), (Shouting, 2, False), (Halved, 1, True)])
def test_the_nearest_definition_is_called(cls, factor, uses_raw):
    network, (cond, uncond), (x, _) = TinyNet().double(), conditions(), latents(1, 3, 4)
    plain, other = Denoiser(network, cond, uncond, 3.0), cls(network, cond, uncond, 3.0)
    value, g = raw_output(other, x, 5, None, None)
    assert (g == 3.0 and value.shape[0] == 2) == uses_raw
    assert relative(other(x, 5), factor * plain(x, 5)) < 1e-15
    chains = [Chain(plain, [Coupling(0, b=0.5 * factor, tag=5)]), Chain(other, [Coupling(0, b=0.5, tag=5)])]
    (first, _), (second, _) = (chain(x) for chain in chains)
    assert relative(first, second) < 1e-15


class DuckWithAll:
    """Hands everything to a Denoiser without deriving from it."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args):
        return self.inner(*args)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class DuckWithRaw(DuckWithAll):
    def raw(self, *args):
        return self.inner.raw(*args)


@pytest.mark.parametrize("make", [DuckWithAll, DuckWithRaw])
def test_objects_that_have_the_methods_go_on_working(make):
    inner = tiny_chain(4).denoiser
    x, y = latents(1, 3, 4, grad=True)
    program = tiny_chain(4).program
    expected = pull(Chain(inner, program)(x, y), [x, y])
    chain = Chain(make(inner), program)
    assert (raw_output(chain.evaluator, x, 5, None, None)[1] is None) == (make is DuckWithAll)
    assert all(relative(got, want) < FP64 for got, want in zip(pull(chain(x, y), [x, y]), expected, strict=True))
    assert [name for name, _ in chain.evaluator.weights()] == ["inside", "outside", "project"]
    half = Denoiser(TinyNet().half(), *conditions(dtype=torch.float16), vjp_dtype=torch.float32)
    adapted = as_evaluator(make(half))
    assert adapted.for_vjp().compute_dtype(torch.float16) == torch.float32 and adapted.insists_on_vjps
    with pytest.raises(ValueError, match=r'memory: "naive" .* cannot take VJPs in vjp_dtype'):
        Chain(make(half), program, "naive")(x, y)
