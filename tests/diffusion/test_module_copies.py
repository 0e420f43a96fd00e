"""Copies of a network: they compute what it does, and leave it as it is in every thread and after every error."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TinyNet, conditions, golden, golden_unet, latents, pull, relative, tiny_chain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.module_copies import ModuleCopies, frozen_copy, why_not_copied
from doodl_fast.diffusion.networks import blocks_checkpointed, frozen, module_tree, without_weight_grad
from doodl_fast.solvers.edict import EDICT


def state_of(net: nn.Module) -> list[Any]:
    """Everything of a network that a run must leave alone."""
    weights = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    tensors = [(name, id(w), type(w), w.dtype, w.requires_grad, w.data_ptr(), w._version) for name, w in weights]
    return tensors + [
        (id(m), m.training, sorted(vars(m)), getattr(m, "gradient_checkpointing", 0)) for m in net.modules()
    ]


# What copies compute


class Tied(nn.Module):
    """Shared weights and modules, references outside of the registers, a buffer, and attributes that calls assign."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.again = self.first
        self.hidden = [nn.Linear(3, 3)]
        self.hidden[0].weight = self.first.weight
        self.listed = [self.second, self.second.weight]
        self.function = functools.partial(self.first.forward)
        self.register_buffer("scale", torch.tensor(2.0))
        self.calls, self.log = 0, []
        self.recurrent = nn.LSTM(3, 3, batch_first=True)
        nn.utils.parametrizations.weight_norm(self.second, "bias", dim=0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.first.weight.requires_grad)
        x = self.recurrent(x)[0] + self.function(x) + self.listed[0](x) + self.again(x)
        return x @ self.listed[1] * self.scale


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_copies_compute_the_same(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    net = Tied()
    before = state_of(net)
    copies = ModuleCopies(net, dtype)
    x = torch.randn(2, 5, 3, dtype=dtype)
    leaf = x.clone().requires_grad_()
    value = copies.of(net)(leaf)
    value.sum().backward()
    reference = copy.deepcopy(net).to(x.dtype).requires_grad_(False)
    other = x.clone().requires_grad_()
    reference(other).sum().backward()
    assert torch.equal(value, reference(x))
    torch.testing.assert_close(leaf.grad, other.grad)
    assert state_of(net) == before and all(p.grad is None for p in net.parameters())
    copies.write_back()
    assert net.calls == 1 and net.log[0] is False and state_of(net) == before
    assert net.function.func.__self__ is net.first and net.listed[0] is net.second


def test_copies_share_storage_and_versions() -> None:
    net = TinyNet()
    copied = ModuleCopies(net).of(net)
    assert copied.inside.data_ptr() == net.inside.data_ptr() and not copied.inside.requires_grad
    with torch.no_grad():
        net.inside.mul_(2)
    assert torch.equal(copied.inside, net.inside) and copied.inside._version == net.inside._version


def test_checkpointed_blocks_of_diffusers() -> None:
    unet, models = golden_unet(), golden("models")
    before = state_of(unet)
    gradients = []
    for checkpoints in (False, True):
        copied = ModuleCopies(unet, checkpoints=checkpoints).of(unet)
        leaf = models["check/unet_in"].clone().requires_grad_()
        out = copied(leaf, 500, encoder_hidden_states=models["embedding_conditional"], return_dict=False)[0]
        gradients.append(torch.autograd.grad(out.sum(), leaf)[0])
        assert state_of(unet) == before
    assert torch.equal(*gradients)


def test_checkpointed_blocks_keep_no_state_of_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dropout is active in them, and reading a GPU's generator waits for the device."""
    states: list[int] = []
    original = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: states.append(1) or original())
    x = torch.ones(1, requires_grad=True)
    checkpoint(torch.sin, x, use_reentrant=False).backward()
    assert states
    states.clear()
    unet, models = golden_unet(), golden("models")
    with blocks_checkpointed(unet):
        for network in (ModuleCopies(unet, checkpoints=True).of(unet), unet):
            leaf = models["check/unet_in"].clone().requires_grad_()
            out = network(leaf, 500, encoder_hidden_states=models["embedding_conditional"], return_dict=False)[0]
            assert torch.autograd.grad(out.sum(), leaf)[0].norm() > 0
    assert not states


def test_cast_weights_are_freed_with_the_pass() -> None:
    seen: list[Any] = []

    class Spy(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.itself = self.forward  # A copy of it refers to itself, so only collection would free it.

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            if self.inside.dtype == torch.float32:
                seen.append(weakref.ref(self.inside))
            return super().forward(x, t, cond)

    cond, uncond = conditions(dtype=torch.float16)
    chain = EDICT(Denoiser(Spy().half(), cond, uncond, vjp_dtype=torch.float32), tiny_chain(4).schedule)
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    outputs = chain(x, y)
    outputs[0].sum().backward()
    # One cast serves the whole pass.
    assert len(seen) == chain.num_network_calls and all(ref is seen[0] for ref in seen) and seen[0]() is None


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_weights_that_were_moved_between_runs_are_seen(memory: str) -> None:
    net = TinyNet().double()
    cond, uncond = conditions()
    chain = EDICT(Denoiser(net, cond, uncond, 3.0), tiny_chain(3).schedule, memory=memory)
    x, y = latents(1, 3, 4, grad=True)
    first = pull(chain(x, y), [x, y])
    net.load_state_dict({name: value * 1.5 for name, value in net.state_dict().items()})
    net.to(torch.float32).to(torch.float64)
    other = EDICT(Denoiser(copy.deepcopy(net), cond, uncond, 3.0), chain.schedule, memory=memory)
    second = pull(chain(x, y), [x, y])
    assert all(map(torch.equal, second, pull(other(x, y), [x, y]))) and not torch.equal(first[0], second[0])


class Recording(TinyNet):
    """Notes at each call which object is called, whether its weights require grad, and whether a graph is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, bool, bool]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.log.append((id(self), self.inside.requires_grad, torch.is_grad_enabled()))
        return super().forward(x, t, cond)


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "naive"])
@pytest.mark.parametrize("trained", [True, False])
def test_copies_are_made_only_for_graphs_of_networks_that_are_not_frozen(
    trained: bool, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making copies takes a few percent of the time of a small network's evaluation, in every run."""
    net = Recording().double().requires_grad_(trained)
    made: list[nn.Module] = []
    original = ModuleCopies.__init__

    def counting(self: ModuleCopies, root: nn.Module, *args: Any, **kwargs: Any) -> None:
        made.append(root)
        original(self, root, *args, **kwargs)

    monkeypatch.setattr(ModuleCopies, "__init__", counting)
    cond, uncond = conditions()
    chain = EDICT(Denoiser(net, cond, uncond, 3.0), tiny_chain(3).schedule, memory=memory)
    x, y = latents(1, 3, 4, grad=True)
    chain(x.detach(), y.detach())
    assert not made and all(who == id(net) and needs is trained for who, needs, _ in net.log)
    net.log.clear()
    pull(chain(x, y), [x, y])
    assert made == [net] * trained
    assert any(graph for _, _, graph in net.log)
    assert all((who == id(net)) is not (trained and graph) for who, _, graph in net.log)
    assert not any(needs and graph for _, needs, graph in net.log)


def test_tree_is_that_of_torch() -> None:
    net = Tied()
    net.register_module("nothing", None)
    net.add_module("cycle", nn.ModuleList([net.recurrent, nn.Sequential()]))
    assert list(map(id, module_tree(net))) == list(map(id, net.modules()))


class Moody(nn.Module):
    """Changes every kind of attribute that it has, in ways that leave the number of attributes as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = "first", "second"
        self.part = nn.Linear(3, 3)
        self.listed: list[Any] = []
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        second = self.second
        del self.second
        self.renamed = second
        self.part.latest = x
        self.listed = [self.part]
        self.scale = self.scale * 2
        return self.part(x)


def test_what_calls_assign_is_given_to_the_network() -> None:
    net = Moody()
    copies = ModuleCopies(net)
    x = torch.ones(1, 3)
    copies.of(net)(x)
    copies.write_back()
    assert net.renamed == "second" and net.part.latest is x and net.listed[0] is net.part and net.scale == 2


# Networks that are not copied


def hooked(net: nn.Module) -> nn.Module:
    """As accelerate's hooks do it: the module's own forward is replaced by a closure over the module."""
    original = net.forward
    net.forward = lambda *args, **kwargs: original(*args, **kwargs)  # type: ignore[method-assign]
    return net


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hooked, "the forward method of TinyNet was replaced"),
        (lambda net: torch.compile(net, backend="eager"), "wraps another module|forward method"),
        (nn.DataParallel, "DataParallel wraps another module"),
        (lambda net: nn.Sequential(net, nn.LazyLinear(3)), "LazyLinear '1' has a weight 'weight' of type Uninit"),
        (lambda net: net.compile(backend="eager") or net, "TinyNet is compiled in place"),
    ],
)
def test_why_not(make: Callable[[nn.Module], nn.Module], reason: str) -> None:
    found = why_not_copied(make(TinyNet()))
    assert found is not None and re.search(reason, found)
    assert why_not_copied(TinyNet()) is None and why_not_copied(golden_unet()) is None


def test_a_network_that_is_not_copied_is_right_and_restored() -> None:
    cond, uncond = conditions()
    schedule = tiny_chain(3).schedule
    x, y = latents(1, 3, 4, grad=True)
    net = hooked(TinyNet().double())
    before = state_of(net)
    got = pull(EDICT(Denoiser(net, cond, uncond, 3.0), schedule)(x, y), [x, y])
    expected = pull(EDICT(Denoiser(TinyNet().double(), cond, uncond, 3.0), schedule)(x, y), [x, y])
    assert all(map(torch.equal, got, expected)) and state_of(net) == before


def test_cast_weights_need_a_copy() -> None:
    cond, _ = conditions(dtype=torch.float16)
    x, _ = latents(1, 3, 4, dtype=torch.float32, grad=True)
    schedule, net = tiny_chain(3).schedule, hooked(TinyNet().half())
    with pytest.raises(
        ValueError, match=r"vjp_dtype: .* cannot be made because the forward method .*use vjp_dtype=None"
    ):
        EDICT(Denoiser(net, cond, vjp_dtype=torch.float32), schedule)(x)
    chain = EDICT(Denoiser(net, cond), schedule)
    with pytest.warns(RuntimeWarning, match="vjp_dtype: .* they are taken in the network's own dtype"):
        (gradient,) = torch.autograd.grad(chain(x)[0].sum(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gradient, torch.autograd.grad(chain(x)[0].sum(), x)[0])
    own = EDICT(Denoiser(TinyNet().half(), cond, vjp_dtype=None), schedule)
    assert relative(gradient, torch.autograd.grad(own(x)[0].sum(), x)[0]) < 1e-6


def test_frozen_copy_of_other_objects() -> None:
    with frozen_copy(len) as same:
        assert same is len
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)).train()
    with frozen_copy(net) as copied:
        assert not any(m.training for m in copied.modules()) and all(m.training for m in net.modules())
        assert isinstance(copied, nn.Sequential) and len(copied) == 2
    with frozen_copy(hooked(net)) as itself:
        assert itself is net and not net.training
    assert net.training and all(p.requires_grad for p in net.parameters())


# Threads


def in_threads(*functions: Callable[[], None]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("memory", ["checkpoint", 2, "naive"])
@pytest.mark.parametrize("vjp_dtype", ["auto", None])
def test_another_thread_never_sees_a_change(memory: str | int, vjp_dtype: str | None) -> None:
    """Two threads run and differentiate, one of which fails now and then, while a third looks at the module."""
    cond, uncond = conditions(dtype=torch.float16)
    calls: list[int] = []

    class Failing(TinyNet):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            calls.append(1)
            if threading.current_thread().name == "failing" and len(calls) % 7 == 0:
                raise KeyError("now and then")
            return super().forward(x, t, cond)

    net = Failing().half()
    net.outside.requires_grad_(False)
    before = state_of(net)
    chain = EDICT(Denoiser(net, cond, uncond, 3.0, vjp_dtype=vjp_dtype), tiny_chain(4).schedule, memory=memory)
    done = threading.Event()
    seen: list[Any] = []

    def gradient() -> list[Tensor]:
        x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
        return list(pull(chain(x, y), [x, y]))

    expected = gradient()

    def work() -> None:
        try:
            for _ in range(8):
                assert all(map(torch.equal, gradient(), expected))
        finally:
            done.set()

    def fail() -> None:
        threading.current_thread().name = "failing"
        failures = 0
        while not done.is_set():
            with contextlib.suppress(KeyError):
                gradient()
                continue
            failures += 1
        assert failures

    def look() -> None:
        while not done.is_set():
            state = state_of(net)
            if state != before:
                seen.append(state)

    assert in_threads(work, fail, look) == []
    assert not seen and state_of(net) == before


@pytest.mark.parametrize("context", [frozen, without_weight_grad, blocks_checkpointed])
def test_contexts_that_overlap_in_any_order(context: Callable[..., Any]) -> None:
    net = golden_unet().train()
    try:
        before = state_of(net)
        first, second = context(net), context(net)
        first.__enter__()
        inside = state_of(net)
        second.__enter__()
        first.__exit__(None, None, None)
        assert state_of(net) == inside != before
        second.__exit__(None, None, None)
        assert state_of(net) == before
    finally:
        net.eval()
