"""memory="auto": the gradient is the same in every plan, predictions hold, and running out of memory is survived."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import (
    DEVICE,
    Counting,
    TinyNet,
    conditions,
    golden_denoiser,
    golden_unet,
    latents,
    pull,
    relative,
    sd_scheduler,
    tiny_chain,
)
from planned_chains import auto, fix

from doodl_fast.chain.memory.planner import MOST_CASES
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.chain.ways import WHOLE
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.module_copies import frozen_copy
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT


def measured(chain: EDICT, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    x = x.detach().clone().requires_grad_()
    with Tracker(DEVICE.type) as tracker:
        outputs = chain(x)
        (gradient,) = torch.autograd.grad(sum(out.square().sum() for out in outputs), x)
        del outputs
    return gradient, tracker.peak


# Whole graphs


@pytest.mark.parametrize("graphs", [1, 3, 6, 99])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_kept_graphs_are_not_evaluated_again(graphs, inverse):
    net = Counting(TinyNet().double())
    chain = fix(tiny_chain(4, "auto", network=net), graphs)
    x, y = latents(1, 3, 4, grad=True)
    cond = chain.denoiser.cond.requires_grad_()
    plain = tiny_chain(4, network=net)
    plain.denoiser.cond.requires_grad_()
    expected = pull((plain.inverse if inverse else plain)(x, y), [x, y, plain.denoiser.cond])
    net.calls.clear()
    outputs = (chain.inverse if inverse else chain)(x, y)
    kept = min(graphs, chain.num_network_calls)
    assert net.calls == [(2, False)] * (6 - kept) + [(2, True)] * kept
    net.calls.clear()
    got = pull(outputs, [x, y, cond])
    assert net.calls == [(2, True)] * (6 - kept)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    net.calls.clear()
    again = pull(outputs, [x, y, cond])  # The first backward pass has freed the graphs.
    assert net.calls == [(2, True)] * 6
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("states", ["checkpoint", 2, "reversible"])
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_graphs_go_with_every_way_of_storing_states(states, arithmetic):
    x, y = latents(1, 3, 4, grad=True)
    expected = pull(tiny_chain(5, states, arithmetic=arithmetic)(x, y), [x, y])
    chain = fix(tiny_chain(5, "auto", arithmetic=arithmetic), 3, states)
    for got, want in zip(pull(chain(x, y), [x, y]), expected, strict=True):
        # A kept graph was made at the true state, not at the undone one.
        assert torch.equal(got, want) if arithmetic == "exact" else relative(got, want) < 1e-12
    assert (chain.drift or 0) < 1e-12


def test_graphs_under_autocast():
    x, y = latents(1, 4, 8, 8, dtype=torch.float32, grad=True)
    got = []
    for memory in ("checkpoint", "auto"):
        chain = EDICT(golden_denoiser(torch.float32), tiny_chain(3).schedule, memory=memory)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            outputs = (fix(chain, 2) if memory == "auto" else chain)(x, y)
        got.append(pull(outputs, [x, y]))
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def test_graphs_of_a_half_network_and_no_graphs_with_vjp_dtype():
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    cond, uncond = conditions(dtype=torch.float16)
    schedule = tiny_chain(3).schedule
    for vjp_dtype, again in ((None, 2), (torch.float32, 4)):
        net = Counting(TinyNet().half())
        denoiser = Denoiser(net, cond, uncond, vjp_dtype=vjp_dtype)
        expected = pull(EDICT(denoiser, schedule)(x, y), [x, y])
        outputs = fix(EDICT(denoiser, schedule, memory="auto"), 2)(x, y)
        net.calls.clear()
        got = pull(outputs, [x, y])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert len(net.calls) == again
    assert EDICT(denoiser, schedule, memory="auto").make_plan(x).num_graphs == 0


def test_graphs_are_freed_one_by_one():
    """A graph is freed when the backward pass has used it, or with the outputs if there is no backward pass."""
    x = latents(1, 4, 8, 8, dtype=torch.float32)[0]
    chain = auto()
    chain(x.clone().requires_grad_())
    with Tracker(DEVICE.type) as tracker:
        start = x.clone().requires_grad_()
        before = tracker.held
        outputs = chain(start)
        assert tracker.held > before + chain.num_network_calls * 10**5
        gradient = torch.autograd.grad(outputs[0].sum(), start, retain_graph=True)[0]
        assert tracker.held < before + 10**5
        del outputs, gradient
        assert tracker.held == before
        outputs = chain(start)
        del outputs
        assert tracker.held == before


# Plans


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_predictions_hold_and_gradients_are_the_same(arithmetic):
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    budget, plans, gradients = None, [], []
    while True:
        chain = auto(budget, arithmetic=arithmetic)
        try:
            plan = chain.make_plan(x)
        except ValueError as error:
            smallest = error
            break
        gradient, peak = measured(chain, x)
        assert chain.plan == plan and (budget is None or peak <= budget * 1.02)
        assert plan.peak == pytest.approx(peak, rel=0.15)
        plans.append(plan)
        gradients.append(gradient)
        budget = plan.peak * 85 // 100
    assert plans[0].recomputed == 0 and plans[-1].way.blocks and len(plans) >= 4
    expected = measured(EDICT(chain.denoiser, chain.schedule, arithmetic=arithmetic), x)[0]
    assert all(torch.equal(gradient, expected) for gradient in gradients)
    needed = int(str(smallest).split("at least ")[1].split()[0])
    assert "the smallest possible for latents of shape (1, 4, 16, 16)" in str(smallest) and budget < needed
    gradient, peak = measured(auto(needed, arithmetic=arithmetic), x)
    # The measurement stops at the first operator that is too much, whose output has at most 24 channels of a pair.
    assert torch.equal(gradient, expected) and peak <= needed + 2 * 24 * 16 * 16 * 4
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        measured(auto(needed - 1, arithmetic=arithmetic), x)


def test_the_embedded_pipeline():
    from doodl_fast import shapes
    from doodl_fast.diffusion.pipeline import encode_prompt, initial_latents

    pipe = shapes.load_pipeline()
    denoiser = Denoiser(pipe.unet, *encode_prompt(pipe, "a red circle")[:2], 4.0)
    x, schedule = initial_latents(pipe), Schedule.from_scheduler(pipe.scheduler, 3)
    everything = EDICT(denoiser, schedule, memory="auto")
    smallest = EDICT(denoiser, schedule, memory="auto", memory_budget=everything.smallest_plan(x).peak)
    gradients = []
    for chain in (everything, smallest):
        plan = chain.make_plan(x)
        gradient, peak = measured(chain, x)
        assert plan.peak == pytest.approx(peak, rel=0.15)
        gradients.append(gradient)
    assert everything.plan.recomputed == 0 and smallest.plan.way.blocks
    assert everything.plan.peak > 8 * smallest.plan.peak and relative(*gradients) < 1e-6


def test_the_network_is_as_it_was():
    unet = golden_unet(torch.float32)
    before = [(module.training, dict(vars(module)).keys()) for module in unet.modules()]
    x = latents(1, 4, 8, 8, dtype=torch.float32)[0]
    chain = auto()
    smallest = chain.planner.case(x).workload.smallest()
    measured(auto(smallest.peak), x)
    assert [(module.training, dict(vars(module)).keys()) for module in unet.modules()] == before
    assert not any(getattr(module, "gradient_checkpointing", False) for module in unet.modules())
    assert all(p.requires_grad for p in unet.parameters())


def test_one_probing_call_for_latents_of_a_kind():
    net = Counting(TinyNet().double())
    chain = tiny_chain(3, "auto", network=net)
    x, y = latents(1, 3, 4, grad=True)
    chain(x.detach(), y.detach())
    assert net.calls == [(2, False)] * 4 and chain.plan is None  # There is no gradient to plan.
    for calls in (2, 0):
        net.calls.clear()
        pull(chain(x, y), [x, y])
        assert len(net.calls) == calls + 4
    net.calls.clear()
    chain(*latents(2, 3, 4, grad=True))
    assert len(net.calls) == 2 + 4
    assert chain.plan.num_graphs == 4 and chain.plan.recomputed == 0


def test_a_plan_made_in_inference_mode():
    x = latents(1, 4, 8, 8, dtype=torch.float32)[0]
    with torch.inference_mode():
        plan = auto().make_plan(x.clone())
    assert plan == auto().make_plan(x) and plan.peak > 10**5


def test_a_reserve_leaves_room_for_a_decoder():
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    budget = auto().make_plan(x).peak
    chain = auto(budget)
    assert chain.make_plan(x, 0).graphs == ((WHOLE, 4),)
    assert chain.make_plan(x, budget // 2).recomputed > 0


@pytest.mark.usefixtures("lean_small_tensors")
def test_looking_at_a_plan_changes_nothing():
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    budget = auto().make_plan(x).peak
    chain = auto(budget)
    told = chain.make_plan(x, budget // 2)
    assert chain.plan == told and chain.planner.reserve == budget // 2
    assert chain.make_plan(x) == told  # This is the next gradient's plan, with the reserve.
    other = latents(2, 4, 16, 16, dtype=torch.float32)[0]
    assert chain.make_plan(other) != told and chain.smallest_plan(other).way != WHOLE
    assert chain.plan == told and chain.planner.reserve == budget // 2
    measured(chain, x)
    assert chain.plan == told


def test_only_the_latest_kinds_of_latents_are_remembered():
    net = Counting(TinyNet().double())
    chain = tiny_chain(2, "auto", network=net)
    for size in range(1, 41):
        chain.make_plan(latents(1, 3, size)[0])
        chain.make_plan(latents(1, 3, 1)[0])  # This one is always among the latest.
    assert len(chain.planner._cases) == MOST_CASES < 40
    net.calls.clear()
    chain.make_plan(latents(1, 3, 1)[0])
    chain.make_plan(latents(1, 3, 40)[0])
    assert not net.calls
    chain.make_plan(latents(1, 3, 2)[0])
    assert net.calls  # It had been dropped, and is measured again.


# Running out of memory


class Hungry(TinyNet):
    """Raises OutOfMemoryError after a number of calls with a graph, and as many times, as `fill` says."""

    left, times = 0, 0

    def forward(self, *args):
        if torch.is_grad_enabled() and self.times:
            self.left -= 1
            if self.left < 0:
                self.times -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(*args)

    def fill(self, calls, times=1):
        self.left, self.times = calls, times


@pytest.mark.parametrize(("calls", "times"), [(0, 1), (3, 1), (1, 2)])
def test_out_of_memory_in_the_forward_run(calls, times):
    net = Hungry().double()
    chain = tiny_chain(4, "auto", network=net)
    x, y = latents(1, 3, 32, 32, grad=True)
    expected = pull(tiny_chain(4, network=net)(x, y), [x, y])
    first = chain.make_plan(x)
    net.fill(calls, times)
    with pytest.warns(RuntimeWarning, match=r"ran out of it with graphs of all .* Said once per chain") as said:
        outputs = chain(x, y)
    assert len(said) == 1
    assert chain.plan.num_graphs == first.num_graphs // 2**times
    assert all(torch.equal(a, b) for a, b in zip(pull(outputs, [x, y]), expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pull(chain(x, y), [x, y])


def test_a_failed_run_is_freed_before_a_smaller_plan_is_sought():
    net = Hungry().double()
    chain = tiny_chain(4, "auto", network=net)
    x, y = latents(1, 3, 32, 32, grad=True)
    graph = chain.make_plan(x).peak // 6
    shrink, seen = chain.planner.shrink, []
    with Tracker(DEVICE.type) as tracker:
        chain.planner.shrink = lambda *case: seen.append(tracker.held) or shrink(*case)
        net.fill(4)
        with pytest.warns(RuntimeWarning, match="ran out of it"):
            chain(x, y)
    assert len(seen) == 1 and seen[0] < graph < tracker.peak / 3


@pytest.mark.parametrize("states", ["checkpoint", "reversible"])
def test_out_of_memory_in_the_backward_pass(states):
    net = Hungry().double()
    x, y = latents(1, 3, 32, 32, grad=True)
    plain = tiny_chain(4, network=net, arithmetic="exact")
    expected = pull(plain(x, y), [x, y])
    chain = tiny_chain(4, "auto", network=net, arithmetic="exact")
    chain.make_plan(x)
    case = chain.planner.case(x)
    case.plan = case.workload.plan(((WHOLE, 3),), states)
    outputs = chain(x, y)
    net.fill(1)
    with pytest.warns(RuntimeWarning, match="memory: ran out of it with graphs of the last 3 evaluations and "):
        got = pull(outputs, [x, y])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert chain.plan.num_graphs == 1


def test_out_of_memory_with_the_smallest_plan():
    net = Hungry().double()
    chain = tiny_chain(4, "auto", network=net)
    x, y = latents(1, 3, 32, 32, grad=True)
    chain.make_plan(x)
    net.fill(0, 99)
    with pytest.warns(RuntimeWarning, match="ran out of it"), pytest.raises(torch.OutOfMemoryError):
        pull(chain(x, y), [x, y])
    net.fill(0, 99)
    with pytest.raises(ValueError, match="memory_budget: expected even one evaluation ran out of memory"):
        tiny_chain(4, "auto", network=net)(x, y)


# Arguments


def test_refusals():
    with pytest.raises(ValueError, match=r"memory_budget: expected None with memory='checkpoint', got '6GiB'; use "):
        tiny_chain(2, memory_budget="6GiB")
    with pytest.raises(ValueError, match="memory_budget: expected bytes or a size"):
        tiny_chain(2, "auto", memory_budget="much")
    with pytest.raises(ValueError, match="memory: expected \"auto\" for a plan, got 'checkpoint'"):
        tiny_chain(2).make_plan(latents(1, 3, 4)[0])
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        tiny_chain(2, "auto", memory_budget=10)(latents(1, 3, 4, grad=True)[0])


# What a run holds as it grows


def held(steps: int, **options) -> tuple[int, list[int]]:
    """The bytes held between the forward run and the backward pass, and at each evaluation of the forward run."""
    seen: list[int] = []
    denoiser = golden_denoiser(torch.float32)

    def watched(x, t, cond):
        seen.append(tracker.held)
        return denoiser.unet(x, t, cond, return_dict=False)[0]

    watching = Denoiser(watched, denoiser.cond, denoiser.uncond)
    x = latents(1, 4, 8, 8, dtype=torch.float32)[0]
    frozen = [p.requires_grad_(False) for p in denoiser.unet.parameters()]
    try:
        with Tracker(DEVICE.type) as tracker:
            chain = EDICT(watching, Schedule.from_scheduler(sd_scheduler(), steps), **options)
            outputs = chain(x.clone().requires_grad_())
            between = tracker.held
            del outputs
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return between, seen


def test_exact_reversal_holds_the_same_at_any_length():
    short, _ = held(5, arithmetic="exact", memory="reversible")
    long, during = held(25, arithmetic="exact", memory="reversible")
    assert short == long
    # Before the third evaluation a part of the state is still the caller's start.
    assert len(during) == 48 and len(set(during[2:])) <= 2 and max(during[2:]) == max(during[2:6])


def test_naive_backpropagation_holds_a_graph_for_each_evaluation():
    denoiser = golden_denoiser(torch.float32)
    cond = torch.cat([denoiser.uncond, denoiser.cond])
    with frozen_copy(denoiser.unet) as unet, Tracker(DEVICE.type) as tracker:
        x = torch.zeros(2, 4, 8, 8, device=DEVICE, requires_grad=True)
        out = unet(x, torch.tensor(1), cond, return_dict=False)[0]
        graph = tracker.held - out.numel() * out.element_size()
    short, long = held(5, memory="naive")[0], held(6, memory="naive")[0]
    assert (long - short) / 2 >= graph > 10**5
