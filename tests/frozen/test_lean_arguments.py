"""Lean layers take their arguments by the names that the layers which they replace give them."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import nn

from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level
from doodl_fast.frozen.layers import PATTERNS


@pytest.mark.parametrize("name", PATTERNS)
def test_every_argument_of_the_layer_is_one_of_the_lean_layer(name):
    module, _, cls = name.rpartition(".")
    try:
        replaced = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError):
        pytest.skip(f"this environment has no {name}")
    arguments = inspect.signature(PATTERNS[name].make(replaced)).parameters.values()
    own = [argument.name for argument in arguments if argument.kind is argument.POSITIONAL_OR_KEYWORD]
    expected = list(inspect.signature(replaced.forward).parameters)
    assert own == expected[: len(own)]
    takes_others = {argument.kind for argument in arguments} >= {inspect.Parameter.VAR_KEYWORD}
    assert takes_others or len(own) == len(expected)


@pytest.mark.parametrize("level", [Level.ON, Level.RECOMPUTE])
@pytest.mark.parametrize(
    ("layer", "name", "shape"),
    [
        (lambda: nn.Conv2d(4, 4, 3), "input", (1, 4, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 4, 3), "input", (1, 4, 5, 5)),
        (lambda: nn.GroupNorm(2, 4), "input", (1, 4, 5, 5)),
        (lambda: nn.LayerNorm(8), "input", (2, 3, 8)),
        (lambda: nn.RMSNorm(8), "x", (2, 3, 8)),
        (lambda: nn.Linear(8, 8), "input", (2, 3, 8)),
        (nn.SiLU, "input", (2, 3, 8)),
        (nn.GELU, "input", (2, 3, 8)),
    ],
    ids=["Conv2d", "ConvTranspose2d", "GroupNorm", "LayerNorm", "RMSNorm", "Linear", "SiLU", "GELU"],
)
def test_an_input_that_is_given_by_name(layer, name, shape, level):
    torch.manual_seed(0)
    plain = layer().eval().requires_grad_(False)
    lean = ModuleCopies(plain, lean=level).of(plain)
    x = torch.randn(shape).requires_grad_()
    found, expected = lean(**{name: x}), plain(x)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))
