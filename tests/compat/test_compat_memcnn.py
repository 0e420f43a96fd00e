"""`compat.memcnn.InvertibleModuleWrapper` around modules that define no operation. Plain autograd is the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randn, relative
from tolerances import FP64
from torch import Tensor, nn

from doodl_fast.compat import memcnn

KEEPS = (True, False)


class Additive(nn.Module):
    """`x, y -> x, y + f(x)` on two inputs, or on one that is split in halves.

    It notes for each call of f whether it had a graph.
    """

    def __init__(self, width: int = 5, one: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Linear(width, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, width)]
        self.f = nn.Sequential(*layers).double()
        self.one, self.calls = one, []

    def shift(self, x: Tensor) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return self.f(x)

    def forward(self, *values: Tensor):
        x, y = values[0].chunk(2) if self.one else values
        out = y + self.shift(x), x  # They are exchanged, so that repetitions change both.
        return torch.cat(out) if self.one else out

    def inverse(self, *values: Tensor):
        y, x = values[0].chunk(2) if self.one else values
        out = x, y - self.shift(x)
        return torch.cat(out) if self.one else out


def gradients(function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((out * randn(*out.shape, seed=9 + n)).sum() for n, out in enumerate(outputs))
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradient(direction, one, keep):
    fn = Additive(one=one)
    wrapper = memcnn.InvertibleModuleWrapper(fn, keep_input=keep, keep_input_inverse=keep)
    inputs = [randn(2, 5, seed=n).requires_grad_() for n in range(1 if one else 2)]
    copies = [x.detach().clone() for x in inputs]
    want = gradients(getattr(fn, direction), inputs)
    fn.calls.clear()
    got = gradients(wrapper if direction == "forward" else wrapper.inverse, inputs)
    assert fn.calls == ([False, True] if keep else [False, False, True])
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-13
    assert all(torch.equal(x, c) and x.untyped_storage().size() for x, c in zip(inputs, copies, strict=True))
    assert all(p.grad is None for p in fn.parameters())


@pytest.mark.parametrize("keep", KEEPS)
def test_backward_gives_a_leaf_its_gradient_once(keep):
    wrapper = memcnn.InvertibleModuleWrapper(Additive(one=True), keep_input=keep)
    x = randn(2, 5).requires_grad_()
    wrapper(x).sum().backward()
    (want,) = torch.autograd.grad(wrapper._fn(x).sum(), x)
    assert relative(x.grad, want) < 1e-13


@pytest.mark.parametrize("keep", KEEPS)
def test_long_sequence(keep):
    """Only the last outputs are held if inputs are rebuilt, even if the caller drops all others."""
    fn = Additive()
    wrapper = memcnn.InvertibleModuleWrapper(fn, keep_input=keep)
    start = [randn(2, 5, seed=n).requires_grad_() for n in range(2)]

    def run(call):
        state = tuple(x.clone() for x in start)
        for _ in range(20):
            state = call(*state)
        return state

    got, want = (gradients(lambda *_, call=call: run(call), start) for call in (wrapper, fn))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-11
    outputs = run(wrapper)
    node, held = outputs[0].grad_fn, []
    while hasattr(node, "call"):
        held.append(any(slot.value is not None for slot in node.call.slots))
        node = node.next_functions[1][0]
    assert held == ([True] + [False] * 19 if not keep else [False] * 20)


def test_gradient_of_an_output_in_the_middle():
    """Its call has dropped it, and it is rebuilt from what came after, although no gradient comes from there."""
    fn = Additive()
    wrapper = memcnn.InvertibleModuleWrapper(fn)
    start = [randn(2, 5, seed=n).requires_grad_() for n in range(2)]
    middle = wrapper(*wrapper(*(x.clone() for x in start)))
    end = wrapper(*wrapper(*middle))
    (got,) = torch.autograd.grad(middle[0].pow(2).sum(), start[0], retain_graph=True)
    (want,) = torch.autograd.grad(fn(*fn(*start))[0].pow(2).sum(), start[0])
    assert relative(got, want) < FP64
    del end


def test_outputs_with_two_consumers():
    fn = Additive(one=True)
    wrapper = memcnn.InvertibleModuleWrapper(fn)
    x = randn(2, 5).requires_grad_()

    def run(call):
        middle = call(x.clone())
        return (call(middle) + 2 * call(middle) + middle.pow(3)).sum()

    (got,), (want,) = (torch.autograd.grad(run(call), x) for call in (wrapper, fn))
    assert relative(got, want) < FP64


@pytest.mark.parametrize("keep", KEEPS)
def test_num_bwd_passes(keep):
    """Two calls of `.backward()` work without retain_graph, as DOODL needs. A third one is refused."""
    fn = Additive(one=True)
    wrapper = memcnn.InvertibleModuleWrapper(fn, keep_input=keep, num_bwd_passes=2)
    x = randn(2, 5).requires_grad_()
    out = wrapper(wrapper(x.clone()))
    for half in out.chunk(2):
        half.pow(2).sum().backward()
    (want,) = torch.autograd.grad(fn(fn(x)).pow(2).sum(), x)
    assert relative(x.grad, want) < FP64
    with pytest.raises(RuntimeError, match="raise num_bwd_passes"):
        out.sum().backward()


@pytest.mark.parametrize("keep", KEEPS)
def test_other_kinds_of_values(keep):
    """Values may be integers, booleans, numbers, None, tensors passed through, and floats of a single element."""

    class Mixed(nn.Module):
        def forward(self, i, t, x, mask, name, scale):
            return i.clone(), t, x * scale * (2 + mask), mask, name, scale

        def inverse(self, i, t, x, mask, name, scale):
            return i.clone(), t, x / scale / (2 + mask), mask, name, scale

    wrapper = memcnn.InvertibleModuleWrapper(Mixed(), keep_input=keep)
    x, scale = randn(2, 3).requires_grad_(), randn(3, seed=5).requires_grad_()
    i, t, mask = torch.tensor([3]), torch.tensor([2.0]), torch.tensor([True, False, True])
    values = (i, t, x.clone(), mask, "dog", scale)
    for _ in range(3):
        values = wrapper(*values)
    out_i, out_t, out, out_mask, name, out_scale = values
    assert out_i.equal(i) and out_t.equal(t) and out_mask.equal(mask) and name == "dog"
    assert not out_i.requires_grad and not out_mask.requires_grad
    got = torch.autograd.grad((out * out_scale).sum(), [x, scale])
    want = torch.autograd.grad((x * scale**4 * (2 + mask) ** 3).sum(), [x, scale])
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < FP64


def test_one_output_is_unpacked_and_unused_outputs_are_no_matter():
    class Two(nn.Module):
        def forward(self, x, y):
            return [2 * x, 3 * y]

        def inverse(self, x, y):
            return (x / 2, y / 3)

    wrapper = memcnn.InvertibleModuleWrapper(Two())
    x, y = randn(2).requires_grad_(), randn(2, seed=1).requires_grad_()
    a, _ = wrapper(x, y)
    assert torch.autograd.grad(a.sum(), [x, y], allow_unused=True)[0].tolist() == [2, 2]
    assert isinstance(memcnn.InvertibleModuleWrapper(Additive(one=True))(randn(2, 5)), Tensor)


@pytest.mark.parametrize("keep", KEEPS)
def test_weight_grads_on_request(keep):
    fn = Additive(one=True)
    x = randn(2, 5)
    want = torch.autograd.grad(fn(x.clone()).pow(2).sum(), list(fn.parameters()))
    wrapper = memcnn.InvertibleModuleWrapper(fn, keep_input=keep, weight_grads=True)
    wrapper(x.requires_grad_()).pow(2).sum().backward()
    for weight, expected in zip(fn.parameters(), want, strict=True):
        assert relative(weight.grad, expected) < 1e-13
    off = memcnn.InvertibleModuleWrapper(copy.deepcopy(fn), keep_input=keep)
    assert not off(x.detach()).requires_grad


def test_disable_is_plain_autograd():
    fn = Additive(one=True)
    wrapper = memcnn.InvertibleModuleWrapper(fn, disable=True)
    x = randn(2, 5).requires_grad_()
    wrapper.inverse(wrapper(x)).pow(2).sum().backward()
    assert relative(x.grad, 2 * x) < FP64
    assert fn.calls == [True, True] and fn.f[0].weight.grad is not None


@pytest.mark.parametrize("keep", KEEPS)
def test_autocast(keep):
    """The backward pass runs under the autocast of the call, and not under the one that is active around it."""
    seen = []

    class Watching(Additive):
        def shift(self, x):
            out = self.f(x)
            seen.append(out.dtype)
            return out.to(x.dtype)

    fn = Watching(one=True).float()
    wrapper = memcnn.InvertibleModuleWrapper(fn, keep_input=keep)
    x = randn(2, 5).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = wrapper(x.clone())
    out.sum().backward()
    assert set(seen) == {torch.bfloat16} and out.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("keep", KEEPS)
def test_preserve_rng_state(keep):
    fn = Additive(one=True, dropout=0.5)
    x = randn(64, 5).requires_grad_()
    wrapper = memcnn.InvertibleModuleWrapper(fn, keep_input=keep, preserve_rng_state=True)
    torch.manual_seed(4)
    out = wrapper(x.clone())
    state = torch.get_rng_state()
    (got,) = torch.autograd.grad(out.pow(2).sum(), x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    (want,) = torch.autograd.grad(fn(x).pow(2).sum(), x)
    assert relative(got, want) < 1e-13


class Counted(nn.Module):
    """A layer whose inverse expects the index of a loop in the opposite direction, as the reference's does."""

    num_timesteps = 4

    def forward(self, i, t, pair, reverse=False):
        index = self.num_timesteps - (int(i) + 1) if reverse else int(i)
        x, y = pair.chunk(2)
        order = [(0, 1), (1, 0)][index % 2]
        state = [x, y]
        for target in order[::-1] if reverse else order:
            shift = torch.sin(state[1 - target] + t)
            state[target] = state[target] - shift if reverse else state[target] + shift
        return i.clone(), t.clone(), torch.cat(state)

    def inverse(self, i, t, pair):
        return self.forward(i, t, pair, reverse=True)


def test_index_is_turned_around_for_inverses_that_want_it():
    """memcnn gives such a layer the forward index, so its gradient is wrong for even numbers of steps."""
    grads = []
    for keep in KEEPS:
        s = memcnn.InvertibleModuleWrapper(Counted(), keep_input=keep)
        x = randn(2, 5).requires_grad_()
        pair = x.clone()
        for i in range(4):
            *_, pair = s(torch.tensor([i]), torch.tensor([0.1 * i]), pair)
        grads.append(torch.autograd.grad(pair.pow(2).sum(), x)[0])
    assert relative(*grads) < FP64


def test_a_wrong_inverse_is_an_error():
    class Wrong(Additive):
        def inverse(self, *values):
            return tuple(0.9 * value for value in super().inverse(*values))

    wrapper = memcnn.InvertibleModuleWrapper(Wrong())
    x, y = randn(2, 5).requires_grad_(), randn(2, 5, seed=1)
    with pytest.raises(RuntimeError, match=r"Wrong\.inverse does not undo its forward.*use keep_input=True"):
        wrapper(x.clone(), y)[0].sum().backward()


@pytest.mark.parametrize("keep", KEEPS)
def test_in_place_changes_are_noticed(keep):
    wrapper = memcnn.InvertibleModuleWrapper(Additive(one=True), keep_input=keep)
    x = randn(2, 5).requires_grad_()
    given = x.clone()
    out = wrapper(given)
    with torch.no_grad():
        (given if keep else out).add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_second_derivatives_are_refused():
    wrapper = memcnn.InvertibleModuleWrapper(Additive(one=True))
    x = randn(2, 5).requires_grad_()
    (grad,) = torch.autograd.grad(wrapper(x.clone()).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_without_grad_mode_nothing_is_held():
    wrapper = memcnn.InvertibleModuleWrapper(Additive(one=True))
    with torch.no_grad():
        out = wrapper(randn(2, 5).requires_grad_())
    assert not out.requires_grad and not hasattr(out, "_doodl_slot")
    with torch.inference_mode():
        assert wrapper.inverse(wrapper(randn(2, 5))).shape == (2, 5)


def test_is_invertible_module():
    good = Additive()
    assert memcnn.is_invertible_module(good, ((2, 5), (2, 5)), torch.float64)
    assert memcnn.is_invertible_module(memcnn.InvertibleModuleWrapper(good), [(2, 5), (2, 5)], torch.float64)
    assert not memcnn.is_invertible_module(nn.Tanh(), (2, 5))

    class Lossy(Additive):
        def inverse(self, *values):
            return tuple(value + 1e-3 for value in super().inverse(*values))

    assert not memcnn.is_invertible_module(Lossy(), ((2, 5), (2, 5)), torch.float64)
    assert memcnn.is_invertible_module(Lossy(), ((2, 5), (2, 5)), torch.float64, atol=1e-2)

    with pytest.raises(ValueError, match="test_input_shape: expected a shape such as"):
        memcnn.is_invertible_module(good, "2, 5")


def test_errors():
    with pytest.raises(TypeError, match="fn: expected a module with forward and inverse, got Tanh; add an inverse"):
        memcnn.InvertibleModuleWrapper(nn.Tanh())
    with pytest.raises(ValueError, match="num_bwd_passes: expected an int of at least 1, got 0"):
        memcnn.InvertibleModuleWrapper(Additive(), num_bwd_passes=0)
    from doodl_fast.compat.doodl import MixingLayer

    with pytest.raises(ValueError, match="weight_grads: MixingLayer treats weights as constants"):
        memcnn.InvertibleModuleWrapper(MixingLayer(), weight_grads=True)(randn(2, 5))
