"""How the chain sits in a caller's program: calls, memory, autograd, layouts, the caller's own tensors."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    MEMORIES,
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
    weights_of,
)
from tolerances import FP64
from torch import nn

from doodl_fast.chain.chain import Chain
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT

ALL = [*MEMORIES, "auto", "naive"]


# Network calls


@pytest.mark.parametrize("memory", ["checkpoint", 1, 7, "reversible"])
@pytest.mark.parametrize(("guidance_scale", "batch"), [(7.5, 2), (1.0, 1)])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_number_of_network_calls(memory, guidance_scale, batch, inverse):
    """T = 50 on Stable Diffusion's schedule: 98 evaluations there, 98 with a graph back, and no other."""
    net = Counting(TinyNet())
    chain = tiny_chain(50, memory, guidance_scale, network=net, dtype=torch.float32)
    x, y = latents(1, 3, 2, 2, dtype=torch.float32, grad=True)
    outputs = (chain.inverse if inverse else chain)(x, y)
    assert net.calls == [(batch, False)] * 98 and chain.num_network_calls == 98
    net.calls.clear()
    pull(outputs, [x, y])
    assert net.calls == [(batch, True)] * 98


def test_without_gradient_nothing_is_stored_or_graphed():
    net = Counting(TinyNet().double())
    chain = tiny_chain(3, network=net)
    x, y = latents(1, 3, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = chain(x, y)
        with torch.no_grad():
            chain(x.clone().requires_grad_(), y)
    assert not saved and not any(out.requires_grad for out in outputs)
    assert {with_graph for _, with_graph in net.calls} == {False}


@pytest.mark.parametrize("make", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("memory", ALL)
def test_runs_inside_and_after_inference_mode(make, memory):
    chain = tiny_chain(3, memory)
    with make():
        x, y = latents(1, 3, 4)
        forth = chain(x, y)
        for got, want in zip(chain.inverse(*forth), (x, y), strict=True):
            assert relative(got, want) < FP64
    z, _ = latents(1, 3, 4, grad=True)
    pull(chain(z, x), [z])  # an inference tensor beside one that requires grad


def test_timesteps_first_met_in_inference_mode_serve_gradients():
    chain = tiny_chain(3, network=lambda x, t, cond: torch.sin(x) * t)  # autograd saves t
    x, _ = latents(1, 3, 4, grad=True)
    with torch.inference_mode():
        chain(x)
    assert pull(chain(x), [x])[0].isfinite().all()


# Memory


def stored_bytes(steps: int, memory: str | int) -> int:
    chain = tiny_chain(steps, memory)
    x, y = latents(1, 3, 8, 8, grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        chain(x, y)
    return sum(sizes)


def test_what_each_mode_stores():
    state = 2 * 3 * 64 * 8
    conds = 2 * 5 * 4 * 8
    start = state  # kept where couplings are undone, to compare with
    assert stored_bytes(5, "reversible") == stored_bytes(50, "reversible") == state + start + conds
    assert stored_bytes(20, "checkpoint") == 19 * state + conds  # one latent for each of 2 x 19 evaluations
    assert stored_bytes(20, 1) == 20 * state + start + conds
    assert stored_bytes(20, 5) == 4 * state + start + conds
    assert stored_bytes(20, 6) == 4 * state + start + conds  # after 6, 12 and 18 steps, and at the end


def test_anchors_bound_the_drift():
    """With the state in fp32 undoing the mixing loses digits with depth; anchors win them back."""
    x, y = latents(1, 3, 4, 4, grad=True)
    gradients = {}
    for memory in ("naive", "reversible", 5):
        options = {"state_dtype": torch.float32, "drift_tolerance": float("inf")}
        chain = tiny_chain(100, memory, dtype=torch.float32, **options)
        xs, ys = x.detach().float().requires_grad_(), y.detach().float().requires_grad_()
        gradients[memory] = pull(chain(xs, ys), [xs, ys])[0]
    free, anchored = (relative(gradients[memory], gradients["naive"]) for memory in ("reversible", 5))
    assert anchored < 1e-5 and free > 4 * anchored


# Autograd


@pytest.mark.parametrize("memory", ALL)
def test_backward_fills_grad_of_leaves_only(memory):
    net = TinyNet().double()
    chain = tiny_chain(3, memory, network=net)
    x, y = latents(1, 3, 4, grad=True)
    expected = pull(chain(x, y), [x, y])
    out = chain(x * 1, y * 1)
    sum((o * w).sum() for o, w in zip(out, weights_of(out), strict=True)).backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(y.grad, expected[1])
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("memory", ALL)
def test_two_backward_passes(memory):
    chain = tiny_chain(4, memory)
    x, y = latents(1, 3, 4, grad=True)
    loss = sum(out.square().sum() for out in chain(x, y))
    first = torch.autograd.grad(loss, [x, y], retain_graph=True)
    second = torch.autograd.grad(loss, [x, y])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [x, y])


@pytest.mark.parametrize("memory", [*MEMORIES, "auto"])
def test_second_derivatives_are_refused_with_advice(memory):
    chain = tiny_chain(3, memory)
    x, _ = latents(1, 3, 4, grad=True)
    plain = torch.autograd.grad(chain(x)[0].sum(), x)[0]
    (grad,) = torch.autograd.grad(chain(x)[0].sum(), x, create_graph=True)
    assert torch.equal(grad.detach(), plain)
    with pytest.raises(RuntimeError, match='memory="naive"'):
        grad.square().sum().backward()


def test_changing_the_memory_mode_later_does_not_matter():
    chain = tiny_chain(4, "reversible")
    x, y = latents(1, 3, 4, grad=True)
    outputs = chain(x, y)
    chain.memory = "naive"
    assert relative(pull(outputs, [x, y])[0], pull(chain(x, y), [x, y])[0]) < 1e-10


def test_chains_of_chains():
    """There and back again inside one graph: the Jacobian of the round trip is the identity."""
    chain = tiny_chain(5, "reversible")
    x, y = latents(1, 3, 4, grad=True)
    for got, want in zip(pull(chain.inverse(*chain(x, y)), [x, y]), weights_of((x, y)), strict=True):
        assert relative(got, want) < 1e-10


# The caller's own things


class Multiplicative(TinyNet):
    """Its graph keeps x and the condition."""

    def forward(self, x, t, cond):
        return torch.sin(x) * super().forward(x, t, cond) * cond[:, :1, :1]


@pytest.mark.parametrize("memory", ALL)
@pytest.mark.parametrize(("first", "guidance_scale"), [(0, 2.0), (1, 1.0)])
def test_in_place_changes_between_forward_and_backward(memory, first, guidance_scale):
    """The caller may overwrite his latents, the results and the conditions.

    The first source is a start and the last one a result, so all of them would be kept if they were not copied.
    """
    cond, uncond = conditions()
    cond.requires_grad_()
    program = [Coupling(target, b=0.7, tag=1) for target in (first, 1 - first, first)]
    chain = Chain(Denoiser(Multiplicative().double(), cond, uncond, guidance_scale), program, memory)
    x, y = latents(1, 3, 4, grad=True)
    expected = pull(chain(x, y), [x, y, cond])
    outputs = chain(x, y)
    copies = tuple(out * 1 for out in outputs)
    with torch.no_grad():
        for tensor in (x, y, cond, uncond, *outputs):
            tensor.fill_(float("nan"))
    for got, want in zip(pull(copies, [x, y, cond]), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("memory", ALL)
def test_callers_tensors_are_left_alone(memory):
    cond, uncond = conditions()
    chain = EDICT(Denoiser(TinyNet().double(), cond, uncond), Schedule.from_scheduler(sd_scheduler(), 3), memory=memory)
    x, y = latents(2, 3, 4, grad=True)
    tensors = (x, y, cond, uncond)
    before = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    outputs = chain(x, y)
    pull(outputs, [x, y])
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert [t._version for t in tensors] == versions
    memory_of = {t.untyped_storage().data_ptr() for t in tensors}
    assert not memory_of & {out.untyped_storage().data_ptr() for out in outputs}
    assert x.requires_grad and not cond.requires_grad


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("memory", ALL)
def test_requires_grad_is_restored_after_an_error(memory, where):
    class Failing(TinyNet):
        broken = False

        def forward(self, *args):
            if torch.is_grad_enabled():  # Without a graph the weights' flags change nothing.
                assert not any(p.requires_grad for p in self.parameters())
            if self.broken:
                raise ArithmeticError("the network broke")
            return super().forward(*args)

    net = Failing().double()
    net.inside.requires_grad_(False)
    chain = tiny_chain(3, memory, network=net)
    x, y = latents(1, 3, 4, grad=True)
    outputs = chain(x, y)
    assert [p.requires_grad for p in net.parameters()] == [False, True, True]
    Failing.broken = True
    if where == "forward":
        with pytest.raises(ArithmeticError, match="the network broke"):
            chain(x, y)
    elif memory not in ("auto", "naive"):  # these keep their graphs
        with pytest.raises(ArithmeticError, match="the network broke"):
            pull(outputs, [x, y])
    assert [p.requires_grad for p in net.parameters()] == [False, True, True]


def test_dropout_switched_on_before_the_backward_pass_is_caught():
    net = nn.Sequential(nn.Dropout(0.5)).eval()
    chain = tiny_chain(3, network=lambda x, t, cond: x)
    chain = EDICT(Denoiser(Sole(net), None), chain.schedule)
    x, y = latents(1, 3, 4, grad=True)
    outputs = chain(x, y)
    net.train()
    with pytest.raises(ValueError, match="Dropout"):
        pull(outputs, [x, y])


class Sole(nn.Module):
    """A module of one argument as a network of three."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, t, cond):
        return self.inner(x)


def test_block_checkpointing_in_the_network():
    """diffusers' own gradient checkpointing, which needs training mode, gives the same gradient."""
    chain = EDICT(golden_denoiser(torch.float64), Schedule.from_scheduler(sd_scheduler(), 3))
    x, y = latents(1, 4, 8, 8, grad=True)
    expected = pull(chain(x, y), [x, y])
    unet = golden_unet(torch.float64)
    try:
        unet.train()
        unet.enable_gradient_checkpointing()
        got = pull(chain(x, y), [x, y])
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
    assert relative(got[0], expected[0]) < FP64 and relative(got[1], expected[1]) < FP64


# Layouts


@pytest.mark.parametrize("memory", ALL)
def test_strided_latents(memory):
    chain = tiny_chain(3, memory)
    dense = [t.detach().clone().requires_grad_() for t in latents(2, 3, 4, 5)]
    expected = pull(chain(*dense), dense)
    last = [t.detach().to(memory_format=torch.channels_last).requires_grad_() for t in dense]
    shared = torch.stack([t.detach() for t in dense], dim=-1).requires_grad_()
    for got, want in zip(pull(chain(*last), last), expected, strict=True):
        assert relative(got, want) < FP64
    (got,) = pull(chain(*shared.unbind(-1)), [shared])
    assert relative(got, torch.stack(expected, dim=-1)) < FP64


def test_a_coupling_that_reads_its_own_result_twice():
    """Sources stored by checkpointing are states, never the tensors they were later turned into."""
    program = [Coupling(1, 1.0, 0.0, 0.7, tag=1), Coupling(0, 2.0, 0.0, 0.0), Coupling(1, 1.0, 0.0, 0.7, tag=2)]
    x, y = latents(1, 3, 4, grad=True)
    denoiser = Denoiser(TinyNet().double(), None)
    expected = pull(Chain(denoiser, program, "naive")(x, y), [x, y])
    for memory in MEMORIES:
        for got, want in zip(pull(Chain(denoiser, program, memory)(x, y), [x, y]), expected, strict=True):
            assert relative(got, want) < FP64


def test_repr_says_what_it_is():
    text = repr(tiny_chain(50, 5))
    assert "98 network calls" in text and "memory=5" in text and "50 steps" in text and "mix_weight=0.93" in text
    assert "1 couplings, 0 evaluations" in repr(Chain(Denoiser(TinyNet(), None), [Coupling(0, 2.0)]))
