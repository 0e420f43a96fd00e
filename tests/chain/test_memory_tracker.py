"""The tracker counts known cases to the byte."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import DEVICE, golden_unet
from torch.utils.checkpoint import checkpoint

from doodl_fast.chain.memory import profiling
from doodl_fast.chain.memory.tracker import OverLimit, Tracker

KIB = 256  # So many float32 numbers take 1 KiB.


def test_tensors_count_until_they_are_freed():
    with Tracker() as tracker:
        a = torch.empty(KIB)
        b = torch.zeros(2 * KIB)
        assert tracker.held == 3 * 1024
        del a
        assert (tracker.held, tracker.peak) == (2 * 1024, 3 * 1024)
        tracker.reset_peak()
        c = b + 1
        assert (tracker.held, tracker.peak) == (4 * 1024, 4 * 1024)
    del b
    assert tracker.held == 2 * 1024
    torch.empty(KIB)
    assert tracker.peak == 4 * 1024 and c.numel() == 2 * KIB


def test_views_and_what_was_there_before_do_not_count():
    before = torch.ones(KIB)
    with Tracker() as tracker:
        views = [before[1:], before.view(2, -1), before.detach()]
        before.add_(1)
        assert tracker.held == 0
        new = before * 2
        views += [new[2:], new.reshape(-1, 2).T]
        new.mul_(3)
        assert tracker.held == 1024
        del new
        assert tracker.held == 1024
        views.clear()
        assert tracker.held == 0


def test_a_storage_that_grows():
    with Tracker() as tracker:
        a = torch.empty(KIB)
        a.resize_(3 * KIB)
        assert tracker.held == 3 * 1024
        del a
        assert tracker.held == 0


def test_a_graph_and_its_backward_pass():
    """The exponential keeps its result and a product both factors. Gradients of intermediate results come and go."""
    x = torch.ones(KIB, requires_grad=True)
    with Tracker() as tracker:
        y = x.exp()
        z = y * y.cos()  # The graph holds y and cos y, and a name holds z.
        assert tracker.held == 3 * 1024
        (gradient,) = torch.autograd.grad(z, x, torch.ones_like(z))
        del y, z
        assert tracker.held == 1024
        assert 4 * 1024 <= tracker.peak <= 8 * 1024
    assert gradient.shape == x.shape


def test_checkpointing_holds_less_and_computes_again():
    def layers(x):
        for _ in range(10):
            x = x.sin()
        return x

    held = []
    x = torch.ones(KIB, requires_grad=True)
    for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=False)):
        with Tracker() as tracker:
            y = run(x)
            held.append(tracker.held)
            y.backward(torch.ones(KIB))
            assert tracker.peak >= 10 * 1024
    assert held == [10 * 1024, 1024]  # The sine keeps its argument. The first is x.


def test_a_limit():
    with Tracker(limit=2 * 1024) as tracker:
        a = torch.empty(2 * KIB)
        with pytest.raises(OverLimit):
            torch.empty(1)
        del a
        torch.empty(2 * KIB)
        x = torch.ones(KIB // 2, requires_grad=True)
        with pytest.raises(OverLimit):
            x.sin().sin().sin().sum().backward()
    assert 2 * 1024 < tracker.peak < 4 * 1024


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_devices_are_told_apart(device):
    with Tracker(device) as tracker:
        kept = [torch.empty(KIB), torch.empty(KIB, device="meta"), torch.empty(KIB, device="meta") + 1]
        assert tracker.held == (1024 if device == "cpu" else 2 * 1024)
    assert kept


def test_the_timeline_is_what_was_held():
    with Tracker(record=True) as tracker:
        a = torch.empty(KIB)
        del a
        b = torch.empty(2 * KIB)
    assert [held for _, held in tracker.timeline] == [1024, 0, 2 * 1024] and b.numel()
    times = [seconds for seconds, _ in tracker.timeline]
    assert times == sorted(times) and times[0] > 0


def test_nothing_is_left_of_a_networks_graph():
    unet = golden_unet()
    x = torch.zeros(1, 4, 8, 8, device=DEVICE, requires_grad=True)
    cond = torch.zeros(1, 8, 16, device=DEVICE)
    gc.collect()
    with Tracker() as tracker:
        out = unet(x, torch.tensor(1), encoder_hidden_states=cond, return_dict=False)[0]
        assert tracker.held > 100 * out.numel()
        torch.autograd.grad(out.sum(), x)
        del out
        gc.collect()
        assert tracker.held == 0


def test_the_old_name_of_a_report():
    with pytest.warns(DeprecationWarning, match="Report is now MemoryReport"):
        old = profiling.Report
    assert old is profiling.MemoryReport
    with pytest.raises(AttributeError, match="has no attribute 'Reports'"):
        profiling.Reports  # noqa: B018
