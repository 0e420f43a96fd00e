"""Gradients of a network's weights are those of plain autograd through the same couplings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, MEMORY_MODES, TinyNet, conditions, latents, pull, relative, sd_scheduler, tiny_chain
from torch import Tensor, nn

from doodl_fast import DDIM, EDICT, Denoiser, Schedule
from doodl_fast.chain.memory.tracker import Tracker


class Net(nn.Module):
    """A network with layers that have lean copies, whose weights are used in several places."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.act = nn.SiLU()
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.project = nn.Linear(4, 8)
        self.leave = nn.ConvTranspose2d(8, 3, 3, padding=1)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) / max(1, weight[0].numel()) ** 0.5
        self.double().to(DEVICE)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        hidden = self.enter(x) + self.project(cond.mean(1))[:, :, None, None] + t / 1000
        hidden = hidden + self.middle(self.act(self.norm(hidden)))
        return self.leave(self.act(self.norm(self.middle(hidden))))


class LowRank(nn.Module):
    """A LoRA: adds the product of two thin matrices to a weight, by `torch.nn.utils.parametrize`."""

    def __init__(self, weight: Tensor, rank: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        rows, columns = weight.shape[0], weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, columns, generator=generator).to(weight) / columns**0.5)
        self.up = nn.Parameter(torch.randn(rows, rank, generator=generator).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def with_lora(network: nn.Module) -> nn.Module:
    network.requires_grad_(False)
    for layer in (network.middle, network.project):
        nn.utils.parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
        layer.parametrizations.weight.original.requires_grad_(False)
    return network


KINDS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "all": lambda: (Net(), True),
    "by name": lambda: (Net(), lambda name: name.startswith(("middle", "norm"))),
    "LoRA": lambda: (with_lora(Net()), True),
}


def edict(network: Any, steps: int = 4, trainable: Any = True, **options: Any) -> EDICT:
    denoiser = Denoiser(network, *conditions(), 3.0, vjp_dtype=None, trainable=trainable)
    return EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), steps), **options)


def by_hand(chain: EDICT, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the couplings in plain PyTorch on the network itself."""
    cond, uncond = conditions()
    state = [x, x]
    for k in chain.program:
        value = k.a * state[k.target] + k.c * state[k.source]
        if k.b:
            both = torch.cat([uncond, cond]).repeat_interleave(len(x), 0)
            u, v = network(state[k.source].repeat(2, 1, 1, 1), torch.tensor(k.tag), both).chunk(2)
            value = value + k.b * (u + 3.0 * (v - u))
        state[k.target] = value
    return state[0], state[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_it_is_the_gradient_of_plain_autograd(mode: str, kind: str) -> None:
    network, trainable = KINDS[kind]()
    chain = edict(network, trainable=trainable, **MEMORY_MODES[mode])
    weights = list(chain.denoiser.trainable)
    x = latents(2, 3, 8, 8, grad=True)[0]
    outputs = chain(x)
    expected = pull(by_hand(chain, network, x), [x, *weights])
    for got, want in zip(pull(outputs, [x, *weights]), expected, strict=True):
        assert want.abs().max() > 1e-3
        assert relative(got, want) < 1e-10


def test_latents_need_not_require_grad_and_the_network_is_left_as_it_was() -> None:
    network = Net()
    before = {name: (weight, weight.clone()) for name, weight in network.named_parameters()}
    chain = edict(network, memory="checkpoint")
    x = latents(1, 3, 8, 8)[0]
    sum(out.square().sum() for out in chain(x)).backward()
    for name, weight in network.named_parameters():
        assert weight is before[name][0] and torch.equal(weight, before[name][1]) and weight.requires_grad
        assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_backward_twice_adds_and_hooks_fire_once() -> None:
    network, fired = Net(), []
    for weight in network.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: fired.append(id(weight)))
    chain = edict(network)
    x = latents(1, 3, 8, 8)[0]
    chain(x)[0].sum().backward()
    assert sorted(fired) == sorted(map(id, network.parameters()))
    once = [weight.grad.clone() for weight in network.parameters()]
    chain(x)[0].sum().backward()
    for weight, first in zip(network.parameters(), once, strict=True):
        assert relative(weight.grad, 2 * first) < 1e-12


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_memory_does_not_depend_on_the_number_of_steps(mode: str) -> None:
    peaks = {}
    for steps in (10, 50):
        network = with_lora(Net())
        chain = edict(network, steps, memory=mode)
        x = latents(1, 3, 24, 24)[0]
        with Tracker() as tracker:
            chain(x)[0].square().sum().backward()
        # "checkpoint" stores the source of each evaluation, and 64 numbers to compare its output with.
        sources = 2 * steps * (x.numel() + 64) * 8 if mode == "checkpoint" else 0
        peaks[steps] = tracker.peak - sources
    assert peaks[50] < 1.05 * peaks[10]


def test_vjps_in_another_dtype() -> None:
    network = Net().to(torch.bfloat16)
    exact = copy.deepcopy(network).double()
    found = {}
    for net, vjp_dtype in ((network, torch.float32), (exact, None)):
        denoiser = Denoiser(net, *conditions(), 3.0, vjp_dtype=vjp_dtype, trainable=True)
        chain = EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), 3))
        found[net] = pull(chain(latents(1, 3, 8, 8)[0]), list(net.parameters()))
    for got, want in zip(found[network], found[exact], strict=True):
        assert relative(got, want) < 0.05


def test_autocast_and_grad_scaler() -> None:
    network = Net().float()
    chain = edict(network)
    x = latents(1, 3, 8, 8, dtype=torch.float32)[0]
    plain = pull(chain(x), list(network.parameters()))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = chain(x)
    mixed = pull(outputs, list(network.parameters()))
    for got, want in zip(mixed, plain, strict=True):
        assert relative(got, want) < 0.1
    with torch.autocast(DEVICE.type, torch.bfloat16):
        scaler.scale(chain(x)[0].float().sum()).backward()
    scaler.unscale_(optimizer)
    scaled = [weight.grad.clone() for weight in network.parameters()]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        want = torch.autograd.grad(chain(x)[0].float().sum(), list(network.parameters()))
    for got, expected in zip(scaled, want, strict=True):
        assert relative(got, expected) < 0.02


def test_an_optimiser_lowers_a_loss() -> None:
    network = with_lora(Net())
    chain = edict(network, trainable=True, memory="reversible")
    optimizer = torch.optim.Adam(chain.denoiser.trainable, lr=0.05)
    x = latents(2, 3, 8, 8)[0]
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (chain(x)[0] - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_an_optimiser_step_between_the_passes_is_refused() -> None:
    network = Net()
    out = edict(network)(latents(1, 3, 8, 8)[0])[0].sum()
    with torch.no_grad():
        network.middle.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"weights: 'middle.weight' was changed in place"):
        out.backward()


def test_the_last_steps_alone() -> None:
    from doodl_fast import LastSteps

    network = Net()
    chain = DDIM(Denoiser(network, *conditions(), 3.0, trainable=True), Schedule.from_scheduler(sd_scheduler(), 4))
    x, weights = latents(1, 3, 8, 8)[0], list(network.parameters())
    chain.last_steps = LastSteps(2)
    got = torch.autograd.grad(chain(x)[0].square().sum(), weights)
    chain.memory = "naive"
    for a, b in zip(got, torch.autograd.grad(chain(x)[0].square().sum(), weights), strict=True):
        assert relative(a, b) < 1e-10
    chain.last_steps = None
    whole = torch.autograd.grad(chain(x)[0].square().sum(), weights)
    assert max(relative(a, b) for a, b in zip(got, whole, strict=True)) > 1e-3


def test_weights_that_are_asked_for_are_no_reason_for_a_warning() -> None:
    network = with_lora(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edict(network)(latents(1, 3, 8, 8)[0])
    with pytest.warns(RuntimeWarning, match="'parametrizations|trainable=True of Denoiser"):
        edict(network, trainable=False)(latents(1, 3, 8, 8)[0])


def test_a_replaced_weight_is_named() -> None:
    network = Net()
    chain = edict(network)
    network.middle.weight = nn.Parameter(torch.zeros_like(network.middle.weight))
    with pytest.raises(RuntimeError, match="trainable: a weight that is trained was replaced"):
        chain(latents(1, 3, 8, 8)[0])[0].sum().backward()


@pytest.mark.parametrize(
    ("trainable", "error", "match"),
    [
        (lambda name: False, ValueError, "got none"),
        ([nn.Parameter(torch.zeros(2))], ValueError, r"trainable\[0\]: expected a parameter of the network"),
        ([torch.zeros(2)], TypeError, r"trainable\[0\]: expected a parameter, got Tensor"),
        (3, TypeError, "trainable: expected True, a predicate on names or a list of parameters, got int"),
    ],
)
def test_what_cannot_be_trained(trainable: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        edict(Net(), trainable=trainable)


def test_networks_that_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="weights that require grad, got 10 that do not"):
        edict(Net().requires_grad_(False), trainable=lambda name: True)
    with pytest.raises(ValueError, match="expected False for a network without weights"):
        edict(lambda x, t, cond: x)
    with pytest.raises(ValueError, match="compile=False"):
        Denoiser(Net(), *conditions(), compile=True, trainable=True)
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*whose forward runs the whole chain"):
        edict(nn.DataParallel(Net()))
    assert tiny_chain(network=TinyNet().double()).denoiser.trainable == ()
