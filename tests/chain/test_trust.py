"""What a chain checks about itself: the drift of undone couplings, and where numbers stop being finite."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, latents, pull, relative, tiny_chain
from tolerances import FP64
from torch import Tensor, nn

from doodl_fast.chain.chain import Chain
from doodl_fast.chain.checks import distance
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.solvers.edict import EDICT

UNDOING = [1, 3, "reversible"]


class Unsteady(TinyNet):
    """Adds `amount` times noise to its output, other noise at every call, once `calls` calls are done."""

    def __init__(self, amount: float, after: int = 0) -> None:
        super().__init__()
        self.amount, self.after, self.calls = amount, after, 0
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, *args: Tensor) -> Tensor:
        self.calls += 1
        out = super().forward(*args)
        if self.calls <= self.after:
            return out
        noise = torch.randn(out.shape, generator=self.generator, dtype=torch.float64)
        return out + self.amount * noise.to(out)


class Switched(TinyNet):
    """A slightly different network from the call after `after` on, as if a benchmark had picked another kernel."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.calls = after, 0

    def forward(self, *args: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(*args) * (1 if self.calls <= self.after else 1.25)


# Drift


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("memory", UNDOING)
def test_drift_of_a_reproducible_network_is_rounding(memory, inverse):
    chain = tiny_chain(10, memory)
    assert chain.drift is None
    x, y = latents(2, 3, 4, 4, grad=True)
    outputs = (chain.inverse if inverse else chain)(x, y)
    assert chain.drift is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pull(outputs, [x, y])
    assert 0 < chain.drift < 1e-12


@pytest.mark.parametrize("memory", ["checkpoint", "naive"])
def test_modes_that_undo_nothing_have_no_drift(memory):
    chain = tiny_chain(4, memory)
    x, y = latents(1, 3, 4, grad=True)
    pull(chain(x, y), [x, y])
    assert chain.drift is None


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("memory", UNDOING)
def test_a_network_that_changes_after_the_forward_run(memory, inverse):
    """The gradient is then that of the changed network, start to end: a truth that plain autograd knows."""
    x, y = latents(1, 3, 4, grad=True)
    chain = tiny_chain(6, memory, network=Switched(12 - 2).double())  # 5 steps call it, twice each
    outputs = (chain.inverse if inverse else chain)(x, y)
    with pytest.warns(
        RuntimeWarning, match=r"drift: undoing the chain missed its start by .* computed again from chec"
    ):
        got = pull(outputs, [x, y])
    assert chain.drift > 1e-3
    oracle = tiny_chain(6, "naive", network=Switched(0).double())
    for gradient, truth in zip(got, pull((oracle.inverse if inverse else oracle)(x, y), [x, y]), strict=True):
        assert relative(gradient, truth) < FP64


@pytest.mark.parametrize("memory", UNDOING)
def test_unchecked_the_gradient_would_be_wrong(memory):
    x, y = latents(1, 3, 4, grad=True)
    chain = tiny_chain(6, memory, network=Switched(10).double(), drift_tolerance=math.inf)
    got = pull(chain(x, y), [x, y])
    assert chain.drift > 1e-3
    for network in (Switched(0), Switched(10**6)):
        truth = pull(tiny_chain(6, "naive", network=network.double())(x, y), [x, y])
        assert relative(got[0], truth[0]) > 1e-3


@pytest.mark.parametrize("memory", [3, "reversible"])
def test_noise_is_reported_once_and_the_gradient_stays_right(memory):
    x, y = latents(1, 3, 4, grad=True)
    chain = tiny_chain(20, memory, network=Unsteady(1e-4).double())
    truth = pull(tiny_chain(20, "naive")(x, y), [x, y])
    with pytest.warns(RuntimeWarning, match="nondeterministic kernels .*cudnn.benchmark") as seen:
        both = [pull(chain(x, y), [x, y]) for _ in range(2)]
    assert len(seen) == 1 and chain.drift > 1e-5
    for got, want in zip((*both[0], *both[1]), (*truth, *truth), strict=True):
        assert relative(got, want) < 5e-3


def test_network_calls_of_a_repeated_gradient():
    network = Switched(8).double()
    chain = tiny_chain(5, "reversible", network=network)
    x, y = latents(1, 3, 4, grad=True)
    outputs = chain(x, y)
    with pytest.warns(RuntimeWarning, match="drift"):
        pull(outputs, [x, y])
    assert network.calls == 4 * chain.num_network_calls  # forward, undone, forward again, back again


def test_a_condition_is_given_the_repeated_gradient():
    def gradient(memory, network):
        cond, uncond = conditions()
        cond.requires_grad_()
        chain = EDICT(Denoiser(network.double(), cond, uncond, 2.0), tiny_chain(5).schedule, memory=memory)
        return torch.autograd.grad(chain(latents(1, 3, 4)[0])[0].sum(), cond)[0]

    with pytest.warns(RuntimeWarning, match="drift"):
        got = gradient("reversible", Switched(8))
    assert relative(got, gradient("naive", Switched(0))) < FP64


def test_rounding_that_swamps_a_long_chain_is_caught():
    """1/p^2 a step over 250 steps is more than fp64 has digits."""
    x, y = latents(1, 3, 4, grad=True)
    chain = tiny_chain(250, "reversible")
    with pytest.warns(RuntimeWarning, match=r'amplifies by 1/p\^2 a step \(use arithmetic="exact"'):
        got = pull(chain(x, y), [x, y])
    chain.memory = "checkpoint"
    assert all(torch.equal(a, b) for a, b in zip(got, pull(chain(x, y), [x, y]), strict=True))


def test_the_callers_autocast_holds_in_the_repeated_run():
    seen: list[torch.dtype] = []

    class Spy(Switched):
        def forward(self, *args):
            seen.append((self.inside @ self.inside.T).dtype)
            return super().forward(*args)

    chain = tiny_chain(4, "reversible", network=Spy(6), dtype=torch.float32)
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        outputs = chain(x, y)
    with pytest.warns(RuntimeWarning, match="drift"):
        pull(outputs, [x, y])
    assert set(seen) == {torch.bfloat16} and len(seen) == 24


def test_in_place_changes_do_not_reach_the_kept_start():
    chain = tiny_chain(4, "reversible")
    x, y = latents(1, 3, 4, grad=True)
    outputs = chain(x, y)
    with torch.no_grad():
        x.fill_(7.0)
    pull(outputs, [x, y])
    assert chain.drift < 1e-12


@pytest.mark.parametrize("value", [-1.0, math.nan, "small"])
def test_bad_tolerance(value):
    with pytest.raises(ValueError, match="drift_tolerance: expected a number of at least 0 or None, got"):
        tiny_chain(2, drift_tolerance=value)


def test_distance():
    ones = [torch.ones(4), torch.ones(4)]
    assert distance(ones, ones) == 0
    assert distance([ones[0], ones[1] + 1], ones).item() == pytest.approx(math.sqrt(0.5))
    assert distance([ones[0] * math.nan, ones[1]], ones).isnan()
    zeros = [torch.zeros(4), torch.zeros(4)]
    assert distance(zeros, zeros) == 0 and not distance(ones, zeros) < 1
    words = [torch.full((4,), 2**60), torch.full((4,), 5), torch.zeros(2, 4, dtype=torch.int64)]
    assert distance(words, words) == 0
    for index in range(3):  # a last bit that float64 does not see, and a buffer
        changed = [word.clone() for word in words]
        changed[index].view(-1)[0] += 1
        assert distance(changed, words) > 0


# NaN and Inf


class Breaking(nn.Module):
    """Multiplies; from call `at` on what it returns, or its derivative, is not finite."""

    def __init__(self, at: int, where: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1, dtype=torch.float64, device=DEVICE))
        self.at, self.where, self.calls = at, where, 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        self.calls += 1
        out = torch.tanh(x) * self.scale.to(x.dtype)
        if self.calls <= self.at:
            return out
        if self.where == "value":
            return out / 0
        return out + (x * 0).square().sum().sqrt()  # 0, but with the derivative 0/0


@pytest.mark.parametrize("memory", ["checkpoint", 2, "reversible", "naive"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_value_that_is_not_finite_is_named(memory, grad):
    chain = tiny_chain(5, memory, network=Breaking(3, "value"), guidance_scale=1.0)
    x, y = latents(1, 3, 4, grad=grad)
    calling = [coupling for coupling in chain.program if coupling.calls_network]
    assert calling[3].step == 1 and calling[3].target == 0  # odd steps change y first
    message = (
        f"forward: NaN or Inf first appeared at step 1 of 0 to 4, timestep {calling[3].tag}, the coupling that updates "
        "x; all before it was finite; the network at y .* in float64: check its weights and conditions"
    )
    with pytest.raises(FloatingPointError, match=message):
        chain(x, y)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("memory", ["checkpoint", 2, "reversible"])
def test_a_derivative_that_is_not_finite_is_named(memory, inverse):
    calls = 8
    chain = tiny_chain(5, memory, network=Breaking(calls + 3, "derivative"), guidance_scale=1.0)
    x, y = latents(1, 3, 4, grad=True)
    outputs = (chain.inverse if inverse else chain)(x, y)
    assert chain.denoiser.unet.calls == calls
    program = chain.program if not inverse else chain.program[::-1]
    wrong = [coupling for coupling in program if coupling.calls_network][::-1][3]
    message = (
        f"VJP: NaN or Inf first appeared at step {wrong.step} of 0 to 4, timestep {wrong.tag}, the coupling that "
        f"updates {'xy'[wrong.target]}; .* look for a root, norm or division at zero"
    )
    with pytest.raises(FloatingPointError, match=message):
        pull(outputs, [x, y])


def test_an_fp16_network_that_overflows_is_told_from_a_bad_one():
    class Large(TinyNet):
        def forward(self, *args):
            return super().forward(*args) * 6e4 * 4

    chain = tiny_chain(3, network=Large().half(), dtype=torch.float16)
    with pytest.raises(FloatingPointError, match=r"overflowed .* in float16: run it in bfloat16 or float32"):
        chain(latents(1, 3, 4, dtype=torch.float32)[0])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_a_loss_whose_gradient_is_not_finite_is_not_the_chains_fault(memory, value):
    chain = tiny_chain(4, memory, network=Breaking(10**6, "value"))
    x, y = latents(1, 3, 4, grad=True)
    outputs = chain(x, y)
    grads = torch.autograd.grad(outputs, [x, y], [torch.full_like(o, value) for o in outputs])
    assert not any(g.isfinite().any() for g in grads)


def test_a_conditions_gradient_that_is_not_finite_is_named():
    class Root(TinyNet):
        def forward(self, x, t, cond):
            return torch.tanh(x) + (cond * 0).sum().sqrt()

    cond, _ = conditions()
    chain = EDICT(Denoiser(Root().double(), cond.requires_grad_()), tiny_chain(3).schedule)
    with pytest.raises(FloatingPointError, match=r"VJP: .* the coupling that updates"):
        torch.autograd.grad(chain(latents(1, 3, 4)[0])[0].sum(), cond)


def test_empty_batches_pass():
    program = [Coupling(0, b=0.5, tag=1), Coupling(1, b=0.5, tag=1)]
    chain = Chain(Denoiser(TinyNet().double(), None), program, "reversible")
    x = torch.zeros(0, 3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.grad(chain(x)[0].sum(), x)[0].shape == (0, 3, 4)


def test_one_synchronisation_a_pass(monkeypatch):
    """Numbers are read on the host once for the latents' check and once at a pass's end, however long the chain."""
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        original = getattr(Tensor, name)

        def counted(self, *args, original=original, name=name):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    counts = []
    for steps in (3, 30):
        x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
        chain = tiny_chain(steps, "reversible", dtype=torch.float16)
        reads.clear()
        outputs = chain(x, y)
        forward = len(reads)
        torch.autograd.grad(outputs, [x, y], [torch.ones_like(o) for o in outputs])
        counts.append((forward, len(reads) - forward))
    assert counts[0] == counts[1] and counts[0][0] <= 2 and counts[0][1] <= 1
