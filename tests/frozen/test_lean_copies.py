"""Which layers of a network are replaced in its copies, and the report of those that are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, lean_report, level_of


class MyConv(nn.Conv2d):
    """A subclass may do something else."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        MyConv(8, 8, 1),
        nn.Conv2d(8, 4, 1, padding="same"),
        nn.Tanh(),
    ).eval()


def test_copies_are_lean_and_the_callers_modules_are_not_touched():
    net = network()
    before = [(module, type(module), dict(module.__dict__)) for module in net.modules()]
    copy = ModuleCopies(net, lean=Level.ON).of(net)
    assert [type(a) is type(b) for a, b in zip(net, copy, strict=True)] == [False, False, False, True, True, True]
    assert all(isinstance(b, type(a)) for a, b in zip(net, copy, strict=True))
    assert [type(b).__name__ for b in copy] == [type(a).__name__ for a in net]
    for module, kind, attributes in before:
        assert type(module) is kind
        assert module.__dict__ == attributes


def test_copies_are_plain_where_nothing_is_asked_for():
    net = network()
    copy = ModuleCopies(net).of(net)
    assert all(type(a) is type(b) for a, b in zip(net, copy, strict=True))


def test_the_report_names_what_is_replaced_and_what_is_not():
    report = lean_report(network())
    assert report.replaced == {"Conv2d": 1, "GroupNorm": 1, "SiLU": 1}
    assert report.left == {("Conv2d", "padding 'same'"): 1}
    assert report.unknown == {"MyConv": 1, "Tanh": 1}
    assert str(report).splitlines() == [
        "lean layers",
        "      1 Conv2d",
        "      1 GroupNorm",
        "      1 SiLU",
        "left as they are",
        "      1 Conv2d: padding 'same'",
        "without a lean way",
        "      1 MyConv",
        "      1 Tanh",
    ]
    assert not lean_report(network(), lean=False).replaced


def with_hook(layer):
    layer.register_forward_hook(lambda *_: None)


def with_forward(layer):
    layer.forward = layer.forward


def with_own_weight(layer):
    class Quantised(nn.Parameter):
        pass

    layer.weight = Quantised(layer.weight.detach())


def with_loose_weight(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


def with_stored_weight(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_hook, "it has hooks"),
        (with_forward, "its forward method was replaced"),
        (with_own_weight, "its weight is of type Quantised"),
        (with_loose_weight, "its weight or bias is no parameter"),
        (with_stored_weight, "its weight is of dtype float8_e4m3fn"),
    ],
)
def test_what_is_left_alone(change, why):
    net = network()
    change(net[0])
    assert lean_report(net).left["Conv2d", why] == 1
    copies = ModuleCopies(net, lean=Level.ON)
    assert type(copies.of(net)[0]) is nn.Conv2d


def test_an_activation_in_place_is_left_alone():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU(inplace=True))
    assert lean_report(net).left == {("SiLU", "it changes its input in place"): 1}


def test_a_parametrised_layer_is_left_alone():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    assert not lean_report(net).replaced


@pytest.mark.parametrize(("lean", "level"), [(False, 0), (True, 1), ("recompute", 2), (Level.ON, 1)])
def test_levels(lean, level):
    assert level_of(lean) == level


@pytest.mark.parametrize("lean", ["on", 1, None, 2.0])
def test_other_levels_are_refused(lean):
    with pytest.raises(ValueError, match='lean: expected True, False or "recompute"'):
        level_of(lean)


def test_attributes_that_a_lean_layer_assigns_are_given_to_the_callers_layer():
    net = network()
    copies = ModuleCopies(net, lean=Level.ON)
    copies.of(net)[0].calls = 3
    copies.write_back()
    assert net[0].calls == 3
    assert type(net[0]) is nn.Conv2d
