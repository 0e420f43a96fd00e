"""Weights as a variable of `optimize`: against a training loop in plain PyTorch, in every memory mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import MEMORY_MODES, TinyNet, conditions, latents, relative, sd_scheduler
from torch import Tensor, nn

import doodl_fast
from doodl_fast import DDIM, EDICT, Denoiser, Schedule

START = latents(2, 3, 4, 4)[0]
RATE = 0.05


def edict(network: nn.Module, **options: Any) -> EDICT:
    denoiser = Denoiser(network, *conditions(), 3.0, vjp_dtype=None, trainable=True)
    return EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), 4), **options)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network one of whose weights stays as it is."""
    net = TinyNet().to(dtype)
    next(net.parameters()).requires_grad_(False)
    return net


def loss(images: Tensor) -> Tensor:
    return (images - 0.3).square().mean()


def run(chain: Any, steps: int = 3, **options: Any) -> Any:
    given = {"variables": {"weights": {"optimizer": torch.optim.SGD, "lr": RATE}}, "progress": False, **options}
    return doodl_fast.optimize(chain, START, None, loss, steps, **given)


def trained_by_hand(net: nn.Module, program: Any, steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the weights of a training loop that runs the couplings in plain PyTorch, and changes `net`."""
    trained = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    optimizer, losses = torch.optim.SGD(trained.values(), lr=RATE), []
    cond, uncond = conditions()
    both = torch.cat([uncond, cond]).repeat_interleave(len(START), 0)
    for _ in range(steps):
        state = [START, START]
        for k in program:
            value = k.a * state[k.target] + k.c * state[k.source]
            if k.b:
                u, v = net(state[k.source].repeat(2, 1, 1, 1), torch.tensor(k.tag), both).chunk(2)
                value = value + k.b * (u + 3.0 * (v - u))
            state[k.target] = value
        mean = (loss(state[0]) + loss(state[1])) / 2
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        losses.append(mean.item())
    return losses, trained


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_it_is_a_training_loop_in_plain_pytorch(mode: str) -> None:
    net = network()
    before = copy.deepcopy(net)
    chain = edict(net, **MEMORY_MODES[mode])
    result = run(chain)
    losses, expected = trained_by_hand(copy.deepcopy(net), chain.program)
    assert result.losses == pytest.approx(losses, rel=1e-10) and losses[2] < losses[0]
    assert result.state_dict().keys() == expected.keys()
    for name, weight in result.state_dict().items():
        moved = expected[name].detach() - before.get_parameter(name)
        assert moved.abs().max() > 1e-4
        assert relative(weight - before.get_parameter(name), moved) < 1e-10
    for name, weight in net.named_parameters():
        assert torch.equal(weight, before.get_parameter(name)) and weight.grad is None


def test_the_weights_that_are_returned_give_the_pictures_that_are_returned() -> None:
    """In a network that loads them, for the final ones and the best ones, which are others."""
    result = run(edict(network()), 5, variables={"weights": {"optimizer": torch.optim.SGD, "lr": 1.5}})
    assert result.best_step < 5, "the steps are meant to overshoot"
    for best, images in ((False, result.images), (True, result.best_images)):
        other = network()
        other.load_state_dict(result.state_dict(best), strict=False)
        with torch.no_grad():
            assert relative(edict(other)(START)[0], images[0]) < 1e-12


def test_with_the_start_and_a_condition() -> None:
    """Each moves as it would without the others, in the first step."""
    options = {"perturbation_scale": 0.0}
    alone = run(edict(network()), 1, **options)
    chain = edict(network())
    variables = {"start": {}, "prompt_embeds": {"lr": 0.01}, "weights": {"optimizer": torch.optim.SGD, "lr": RATE}}
    together = run(chain, 1, variables=variables, **options)
    for name, weight in alone.state_dict().items():
        assert relative(together.state_dict()[name], weight) < 1e-12
    with pytest.warns(RuntimeWarning, match="'weights' is not among the variables"):
        start = doodl_fast.optimize(chain, START, None, loss, 1, progress=False, **options)
    assert relative(together.latents[0], start.latents[0]) < 1e-12
    assert not torch.equal(together.variables["prompt_embeds"][0], chain.denoiser.cond)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vjp_dtype", [None, torch.float32])
def test_weights_in_half_precision_are_optimised_in_float32(dtype: torch.dtype, vjp_dtype: Any) -> None:
    """Steps that are too small for the weights' own dtype add up."""
    net = network(dtype)
    before = {name: weight.detach().clone() for name, weight in net.named_parameters() if weight.requires_grad}
    schedule = Schedule.from_scheduler(sd_scheduler(), 3)
    denoiser = Denoiser(net, *conditions(dtype=dtype), 3.0, vjp_dtype=vjp_dtype, trainable=True)
    small = {"weights": {"optimizer": torch.optim.SGD, "lr": 1e-5}}
    result = run(DDIM(denoiser, schedule), 2, variables=small)
    exact = copy.deepcopy(net).double()
    reference = DDIM(Denoiser(exact, *conditions(), 3.0, vjp_dtype=None, trainable=True), schedule)
    expected = run(reference, 2, variables=small).state_dict()
    for name, weight in result.state_dict().items():
        change, own = weight.double() - before[name].double(), expected[name] - before[name].double()
        assert weight.dtype == torch.float32 and 0 < change.abs().max() < 1e-3
        assert relative(change, own) < 0.1
        assert net.get_parameter(name).dtype == dtype and torch.equal(net.get_parameter(name), before[name])


def test_a_loss_that_names_the_weights() -> None:
    """A penalty on all of them, beside the loss of the pictures."""

    def small(weights: list[Tensor]) -> Tensor:
        return sum(weight.square().sum() for weight in weights)

    net = network()
    plain, decayed = (
        doodl_fast.optimize(
            edict(net), START, None, terms, 1, variables={"weights": {"optimizer": torch.optim.SGD, "lr": RATE}}
        ).state_dict()
        for terms in (loss, [loss, (small, 0.5)])
    )
    for name, weight in plain.items():
        assert relative(decayed[name], weight - RATE * net.get_parameter(name).detach()) < 1e-12


def test_a_run_is_resumed_to_the_bit(tmp_path: Any) -> None:
    variables = {"weights": {"lr": 0.01}, "start": {"lr": 0.1, "optimizer": torch.optim.Adam}}
    whole = run(edict(network()), 5, variables=variables)
    run(edict(network()), 3, variables=variables, folder=tmp_path)
    resumed = run(edict(network()), 5, variables=variables, resume=tmp_path)
    assert whole.losses == resumed.losses and torch.equal(whole.latents[0], resumed.latents[0])
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
        assert torch.equal(whole.state_dict(best=True)[name], resumed.state_dict(best=True)[name])
    other = network()
    with torch.no_grad():
        next(w for w in other.parameters() if w.requires_grad).mul_(1.1)
    with pytest.raises(ValueError, match=r"resume: the run in .* had values=|differs in its weights"):
        run(edict(other), 6, variables=variables, resume=tmp_path)


def test_trained_weights_that_are_no_variable_are_named() -> None:
    with pytest.warns(RuntimeWarning, match="chain: 2 weights of its network are trained, and 'weights' is not among"):
        run(edict(network()), 1, variables=None)


def test_what_is_refused() -> None:
    plain = EDICT(Denoiser(TinyNet().double(), *conditions(), 3.0), Schedule.from_scheduler(sd_scheduler(), 2))
    with pytest.raises(ValueError, match=r"variables\['weights'\]: expected a chain with trained weights, got"):
        run(plain)
    with pytest.raises(ValueError, match=r"variables\['weights'\]: expected per_sample=False, as the samples"):
        run(edict(network()), per_sample=True)
    with pytest.raises(ValueError, match=r"variables\['weights'\]: expected a value of \d+ tensor\(s\) of shape"):
        run(edict(network()), variables={"weights": {"value": [torch.zeros(2)]}})
    with pytest.raises(ValueError, match="state_dict: expected a run whose variables include 'weights'"):
        doodl_fast.optimize(plain, START, None, loss, 1, progress=False).state_dict()
