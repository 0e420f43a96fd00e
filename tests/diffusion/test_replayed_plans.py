"""memory="auto" and recorded calls: plans count recordings, keep no graphs beside them, and take what is faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, Counting, TinyNet, latents, pull, tiny_chain
from recorder_again import Again, with_recordings

from doodl_fast.chain.ways import WHOLE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="a stand-in for CUDA graphs records on the CPU")


@pytest.fixture(autouse=True)
def _new_recorder() -> None:
    Again.made, Again.replay_seconds = 0, 0.1


def chain(budget: int | None = None, network: torch.nn.Module | None = None) -> Any:
    made = tiny_chain(4, "auto", network=network or TinyNet().double(), memory_budget=budget)
    return with_recordings(made)


def gradient(made: Any, size: int = 32) -> list[torch.Tensor]:
    x, y = latents(1, 3, size, size, grad=True)
    outputs = made(x, y)
    return [*outputs, *pull(outputs, [x, y])]


def test_replayed_calls_keep_no_graphs() -> None:
    made = chain()
    expected = gradient(tiny_chain(4))
    for _ in range(2):
        assert all(map(torch.equal, gradient(made), expected))
    plan = made.plan
    assert plan.recordings > 0 and plan.graphs == () and plan.recomputed == plan.evaluations == 6
    assert "replayed as CUDA graphs, whose recordings hold " in str(plan)
    assert made.denoiser.cuda_graphs.why_not is None and Again.made == 3
    sizes = made.planner.case(latents(1, 3, 32, 32)[0]).workload.sizes(WHOLE)
    # A recording holds a call and its VJP, and the network is called beside it while it is made.
    assert plan.recordings == sizes.pull and plan.peak > 2 * sizes.pull


def test_a_plan_that_keeps_graphs_is_launched_and_evaluates_nothing_again() -> None:
    """A replay that takes as long as a call saves less than kept graphs do."""
    Again.replay_seconds = 0.95
    net = Counting(TinyNet().double())
    made = chain(network=net)
    expected = gradient(tiny_chain(4))
    x, y = latents(1, 3, 32, 32, grad=True)
    with pytest.warns(RuntimeWarning, match="calls are not replayed, because the plan .* faster without replays"):
        made.make_plan(x)
    net.calls.clear()
    outputs = made(x, y)
    assert len(net.calls) == 6
    got = [*outputs, *pull(outputs, [x, y])]
    assert len(net.calls) == 6
    assert all(map(torch.equal, got, expected))
    assert made.plan.graphs == ((WHOLE, 6),) and made.plan.recordings == 0
    assert (
        made.denoiser.cuda_graphs.why_not == 'the plan of memory="auto" keeps graphs, and so is faster without replays'
    )
    assert not made.denoiser.cuda_graphs._streams


def test_the_faster_plan_depends_on_what_fits() -> None:
    """A replay of 0.7 of a call is slower than kept graphs of all evaluations, and faster than those of half."""
    Again.replay_seconds = 0.7
    roomy = chain()
    x = latents(1, 3, 32, 32)[0]
    with pytest.warns(RuntimeWarning, match="faster without replays"):
        assert roomy.make_plan(x).graphs == ((WHOLE, 6),)
    workload = roomy.planner.case(x).workload
    budget = workload.replayed().peak
    tight = chain(budget)
    assert tight.make_plan(x).recordings > 0 and workload.fastest(budget).graphs == ((WHOLE, 3),)
    assert torch.equal(gradient(tight)[2], gradient(roomy)[2])


def test_no_room_for_recordings() -> None:
    x = latents(1, 3, 32, 32)[0]
    budget = chain().planner.case(x).workload.replayed().peak - 1
    made = chain(budget)
    with pytest.warns(RuntimeWarning, match="calls are not replayed, because the plan .* has no room for recordings"):
        got = gradient(made)
    assert all(map(torch.equal, got, gradient(tiny_chain(4))))
    assert made.plan.recordings == 0 and made.plan.peak <= budget and Again.made == 0


def test_a_network_that_cannot_be_recorded_keeps_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Any, function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Again, "record", record)
    made = chain()
    with pytest.warns(RuntimeWarning, match="cannot be recorded: operation not permitted when stream is capturing"):
        got = gradient(made)
    assert all(map(torch.equal, got, gradient(tiny_chain(4))))
    assert made.plan.graphs == ((WHOLE, 6),)
    assert "cannot be recorded" in made.denoiser.cuda_graphs.why_not


def test_out_of_memory_beside_recordings() -> None:
    """The recordings are freed, and the same gradient is found by calls."""

    class Hungry(TinyNet):
        full = False

        def forward(self, *args: Any) -> torch.Tensor:
            if self.full and torch.is_grad_enabled():
                self.full = False
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(*args)

    net = Hungry().double()
    made = chain(network=net)
    expected = gradient(tiny_chain(4))
    x, y = latents(1, 3, 32, 32, grad=True)
    outputs = made(x, y)
    assert made.plan.recordings > 0
    net.full = True
    with pytest.warns(RuntimeWarning) as said:
        got = pull(outputs, [x, y])
    assert "memory ran out beside the recordings" in str(said[0].message) and "ran out of it" in str(said[1].message)
    assert all(map(torch.equal, got, expected[2:]))
    assert made.plan.recordings == 0 and not made.denoiser.cuda_graphs._streams
    assert made.denoiser.cuda_graphs.why_not == "memory ran out beside the recordings"
    assert all(map(torch.equal, gradient(made), expected))


def test_networks_on_other_devices_are_planned_as_ever() -> None:
    made = tiny_chain(4, "auto")
    assert made.make_plan(latents(1, 3, 32, 32)[0]).graphs == ((WHOLE, 6),)
    assert made.denoiser.recordings(DEVICE) is None and made.denoiser.recordings(torch.device("cuda")) is not None
