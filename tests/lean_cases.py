"""What the tests of ops in lean layers have in common: counted calls, gradients, and comparisons with plain layers."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import relative
from torch import Tensor

from doodl_fast import ops
from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level
from doodl_fast.ops.backends import registry


def counting(monkeypatch: pytest.MonkeyPatch, op: str) -> Counter[str]:
    """Counts from now on the calls of an op, under "", and of its gradient, under "_backward"."""
    counts: Counter[str] = Counter()

    def counted(suffix: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[suffix] += 1
            return function(*args)

        return call

    for suffix in ("", "_backward"):
        monkeypatch.setattr(ops, op + suffix, counted(suffix, getattr(ops, op + suffix)))
    return counts


def gradient(network: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input for a cotangent that is not constant."""
    output = network(x, *args)
    output = getattr(output, "sample", output)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    return output.detach(), torch.autograd.grad(output, x, weights)[0]


def check(layer: Any, x: Tensor, how_lean: Level = Level.ON, args: tuple[Any, ...] = (), least: float = 1e-2) -> None:
    """Asserts that a lean copy gives the bits of a plain one, with and without a graph.

    least: What some element of the gradient must be greater than, so that the comparison means something.
    """
    want = gradient(ModuleCopies(layer).of(layer), x, *args)
    lean = ModuleCopies(layer, lean=how_lean).of(layer)
    for got, expected in zip(gradient(lean, x, *args), want, strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(lean(x, *args), want[0])
    assert want[1].abs().max() > least


def check_autocast_compile_and_transforms(layer: Any, x: Tensor) -> None:
    """Asserts that a lean copy does the same as a plain one where something casts, traces or transforms it."""
    plain, lean = (ModuleCopies(layer, lean=how_lean).of(layer) for how_lean in (Level.OFF, Level.ON))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), lean(x))
    torch.compiler.reset()
    assert torch.equal(torch.compile(lean, backend="eager", fullgraph=True)(x), plain(x))
    for transform in (
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.jvp(f, (x,), (x.detach().cos(),))[1],
        lambda f: torch.func.grad(lambda x: f(x).sin().sum())(x),
    ):
        assert torch.equal(transform(lean), transform(plain))


def check_second_derivatives(layer: Any, x: Tensor) -> None:
    """Asserts that the gradient of a gradient is that of a plain copy."""
    found = []
    for how_lean in (Level.OFF, Level.ON):
        network = ModuleCopies(layer, lean=how_lean).of(layer)
        (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))


def check_gradient_of_weights_alone(make: Any, x: Tensor) -> None:
    """Asserts that the gradient of a projection's weights is a plain copy's, where the layer's input wants none.

    make: Makes the layer, which has its projection as `proj`.
    """
    found = []
    for how_lean in (Level.OFF, Level.ON):
        layer = make()
        lean = ModuleCopies(layer, lean=how_lean).of(layer)
        lean.proj.weight.requires_grad_()
        found.append(torch.autograd.grad(lean(x.detach()).square().sum(), lean.proj.weight)[0])
    assert torch.equal(*found)


def check_tritons_kernels(layer: Any, x: Tensor) -> None:
    """Asserts that a lean copy whose op Triton computes is as close to float64 as a plain copy."""
    truth = gradient(copy.deepcopy(layer).double(), x.detach().double().requires_grad_())
    plain = gradient(ModuleCopies(layer).of(layer), x)
    lean = ModuleCopies(layer, lean=Level.ON).of(layer)
    with ops.backend("triton"):
        found = gradient(lean, x)
        with torch.no_grad():
            assert torch.equal(lean(x), found[0])
    for got, other, want in zip(found, plain, truth, strict=True):
        assert relative(got, want) <= 1.1 * relative(other, want)


class OnCard(torch.Tensor):
    """What the choice of an op reads from a tensor, as if the tensor were on a CUDA device."""


def on_card(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Any]) -> type[OnCard]:
    """Tensors of the class that this returns are on a CUDA device on which these kernels and eager ones compute."""
    monkeypatch.setitem(registry._chosen, ("cuda", registry._environment), {**registry.EAGER, **kernels})
    monkeypatch.setattr(OnCard, "is_cuda", True, raising=False)
    monkeypatch.setattr(OnCard, "is_cpu", False, raising=False)
    monkeypatch.setattr(OnCard, "device", torch.device("cuda"), raising=False)
    return OnCard
