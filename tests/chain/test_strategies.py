"""Memory strategies as objects: they mean what the strings mean, can be shared, and say what they do not support."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from conftest import TinyNet, conditions, golden_denoiser, latents, pickled, pull, sd_scheduler, tiny_chain

import doodl_fast
from doodl_fast import Auto, Checkpoint, Naive, Reversible
from doodl_fast.chain.chain import Chain
from doodl_fast.chain.evaluator import Evaluator
from doodl_fast.chain.memory.strategies import MemoryStrategy, strategy_of
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT


class Decay(Evaluator):
    """f(x) = -x, with a count of its calls."""

    calls = 0

    def __call__(self, x, t, tensors=None, latents_dtype=None):
        self.calls += 1
        return -x


PAIRS = [
    ("checkpoint", Checkpoint()),
    ("reversible", Reversible()),
    (2, Reversible(every=2)),
    ("naive", Naive()),
    ("auto", Auto()),
]
IDS = [repr(strategy) for _, strategy in PAIRS]


@pytest.mark.parametrize(("name", "strategy"), PAIRS, ids=IDS)
def test_names_stand_for_strategies(name, strategy):
    assert strategy_of(name) == strategy_of(strategy) == strategy and hash(strategy) == hash(strategy_of(name))
    assert pickle.loads(pickle.dumps(strategy)) == copy.deepcopy(strategy) == strategy
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.every = 3
    assert doodl_fast.Checkpoint is Checkpoint and doodl_fast.Auto is Auto


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(("name", "strategy"), PAIRS, ids=IDS)
def test_the_same_gradient_to_the_bit(name, strategy, inverse):
    x, y = latents(1, 3, 4, grad=True)
    results = []
    for memory in (name, strategy):
        chain = tiny_chain(4, memory)
        assert chain.memory is memory and repr(memory) in repr(chain)
        outputs = (chain.inverse if inverse else chain)(x, y)
        results.append([*outputs, *pull(outputs, [x, y]), torch.tensor(chain.drift or 0.0)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("strategy", [strategy for _, strategy in PAIRS], ids=IDS)
def test_two_chains_share_a_strategy(strategy):
    """What one chain does with it leaves no trace for the other."""
    before = pickle.dumps(strategy)
    first, second = tiny_chain(3, strategy), tiny_chain(5, strategy)
    x, y = latents(1, 3, 4, grad=True)
    expected = pull(second(x, y), [x, y])
    outputs = first(x, y)
    again = second(x, y)
    assert all(torch.equal(a, b) for a, b in zip(pull(again, [x, y]), expected, strict=True))
    pull(outputs, [x, y])
    assert pickle.dumps(strategy) == before
    if isinstance(strategy, Auto):
        assert first.planner is not second.planner and first.plan.evaluations < second.plan.evaluations


def test_a_budget_of_a_strategy_is_that_of_the_chain():
    schedule = Schedule.from_scheduler(sd_scheduler(), 3)
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    chain = EDICT(golden_denoiser(torch.float32), schedule, memory=Auto())
    assert chain.memory_budget is None and chain.plan is None
    budget = chain.make_plan(x).peak // 2
    plans = []
    for options in ({"memory": Auto(budget)}, {"memory": Auto(str(budget))}, {"memory_budget": budget}):
        chain = EDICT(golden_denoiser(torch.float32), schedule, **{"memory": "auto", **options})
        assert chain.memory_budget == budget
        plans.append(chain.make_plan(x))
    assert plans[0] == plans[1] == plans[2] and plans[0].peak <= budget and plans[0].recomputed > 0


def test_the_memory_can_be_changed():
    chain = tiny_chain(3, "auto", memory_budget="1GiB")
    x, y = latents(1, 3, 4, grad=True)
    pull(chain(x, y), [x, y])
    assert chain.plan is not None
    chain.memory = Checkpoint()
    assert chain.memory == Checkpoint() and chain.planner is chain.plan is chain.memory_budget is None
    chain.memory = "auto"
    assert chain.memory_budget == 2**30
    chain.memory = Auto("2GiB")
    assert chain.memory_budget == 2**31


def test_what_strategies_support():
    supports = {
        type(strategy).__name__: (
            strategy.supports_exact_arithmetic,
            strategy.supports_vjp_dtype,
            strategy.supports_inverse,
            strategy.undoes_couplings,
        )
        for _, strategy in PAIRS
    }
    assert supports == {
        "Checkpoint": (True, True, True, False),
        "Reversible": (True, True, True, True),
        "Naive": (False, False, True, False),
        "Auto": (True, True, True, True),
    }


def test_refusals():
    with pytest.raises(ValueError, match=r"memory: Naive\(\) is plain autograd, .* arithmetic='exact'; use "):
        tiny_chain(2, Naive(), arithmetic="exact")
    cond, uncond = conditions(dtype=torch.float16)
    wide = EDICT(Denoiser(TinyNet().half(), cond, uncond, vjp_dtype=torch.float32), tiny_chain(2).schedule)
    wide.memory = Naive()
    with pytest.raises(ValueError, match=r"memory: Naive\(\) differentiates the very calls"):
        wide(latents(1, 3, 4, dtype=torch.float32, grad=True)[0])
    for every in (0, -1, True, 2.0, "2"):
        with pytest.raises(ValueError, match="every: expected an int of at least 1 or None, got "):
            Reversible(every)
    with pytest.raises(ValueError, match='budget: expected bytes or a size such as "6GiB" or "500MB", got \'much\''):
        Auto("much")
    with pytest.raises(TypeError, match=r"budget: expected bytes or a size .* got float"):
        Auto(1.5)
    with pytest.raises(ValueError, match=r"memory_budget: expected None with memory=Auto\(.*use Auto\(budget=\.\.\.\)"):
        tiny_chain(2, Auto(), memory_budget="1GiB")
    with pytest.raises(ValueError, match=r"memory: expected one of .* got <class .*Checkpoint.*strategy object"):
        tiny_chain(2, Checkpoint)
    with pytest.raises(ValueError, match=r"memory: expected \"auto\" for a plan, got Checkpoint\(\); make"):
        tiny_chain(2, Checkpoint()).make_plan(latents(1, 3, 4)[0])


def test_a_strategy_of_ones_own():
    """It is used as it is, and what it says that it does not support is refused."""

    class Forwards(MemoryStrategy):
        supports_exact_arithmetic = False
        supports_vjp_dtype = False
        supports_inverse = False

        def run(self, runs, latents, tensors, inverse, planner):
            return Checkpoint().run(runs, latents, tensors, inverse, planner)

    x, y = latents(1, 3, 4, grad=True)
    expected = pull(tiny_chain(3)(x, y), [x, y])
    chain = tiny_chain(3, Forwards())
    assert all(torch.equal(a, b) for a, b in zip(pull(chain(x, y), [x, y]), expected, strict=True))
    assert not chain.inverse(x.detach())[0].requires_grad
    with pytest.raises(ValueError, match=r"memory: .* does not support gradients of chain.inverse; use \"checkpoint\""):
        chain.inverse(x, y)
    with pytest.raises(ValueError, match=r"memory: .* does not support arithmetic='exact'; use \"checkpoint\""):
        tiny_chain(3, Forwards(), arithmetic="exact")
    cond, uncond = conditions(dtype=torch.float16)
    wide = EDICT(Denoiser(TinyNet().half(), cond, uncond, vjp_dtype=torch.float32), chain.schedule, memory=Forwards())
    with pytest.raises(ValueError, match=r"memory: .* does not support vjp_dtype; use \"checkpoint\""):
        wide(x.float())


@pytest.mark.parametrize("name", ["evaluator", "program", "state_dtype", "arithmetic", "plan", "drift"])
def test_what_a_chain_was_made_with_is_read_only(name):
    chain = tiny_chain(2)
    before = getattr(chain, name)
    with pytest.raises(AttributeError, match=name):
        setattr(chain, name, torch.float16)
    assert getattr(chain, name) is before and chain.denoiser is chain.evaluator


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copied_chain_plans_with_its_own_evaluator(copied):
    chain = Chain(Decay(), [Coupling(k % 2, b=0.1, step=k, tag=k) for k in range(4)], memory="auto")
    x, y = latents(1, 3, 4, grad=True)
    expected = pull(chain(x, y), [x, y])
    other = copied(chain)
    assert other.memory == "auto" and other.plan == chain.plan and other.evaluator is not chain.evaluator
    before, other.evaluator.calls = chain.evaluator.calls, 0
    assert all(torch.equal(a, b) for a, b in zip(pull(other(x, y), [x, y]), expected, strict=True))
    assert other.evaluator.calls == 4  # whole graphs are kept, and what was measured is remembered
    other.make_plan(latents(2, 3, 4)[0])
    assert other.evaluator.calls == 4 + 2 and chain.evaluator.calls == before


@pytest.mark.parametrize("reserve", [-1, "1GiB", 1.5, True])
def test_a_reserve_that_is_no_number_of_bytes_is_refused(reserve):
    chain, (x, _) = tiny_chain(2, "auto"), latents(1, 3, 4)
    with pytest.raises(ValueError, match="reserve: expected an int of at least 0, in bytes, or None, got "):
        chain.make_plan(x, reserve)
