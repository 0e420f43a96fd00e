"""Optimizers of torch.optim: instances, LBFGS, learning-rate schedules and their storage."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import latents, relative, tiny_chain
from test_optimize import optimize, problem, quiet_loss
from torch import Tensor

import doodl_fast
from doodl_fast.optimization.optimizers import Stepper

START = latents(2, 3, 4, 4)[0]


def test_an_instance_is_an_example_of_its_class_and_options() -> None:
    """The caller's own optimizer and tensors stay as they are."""
    own = torch.ones(3, requires_grad=True)
    example = torch.optim.Adam([own], lr=0.05, betas=(0.5, 0.9), weight_decay=0.1)
    got = optimize(optimizer=example, loss=quiet_loss)
    expected = optimize(
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9), weight_decay=0.1), loss=quiet_loss
    )
    assert torch.equal(got.latents[0], expected.latents[0])
    assert not example.state and own.grad is None and torch.equal(own, torch.ones(3))
    own.sum().backward()
    example.step()
    with pytest.warns(RuntimeWarning, match="optimizer: Adam has taken steps already; its class and options are taken"):
        optimize(optimizer=example, loss=quiet_loss, num_optimization_steps=1)


def loss(images: Tensor) -> Tensor:
    goal = torch.linspace(-1, 1, images.numel(), dtype=images.dtype, device=images.device)
    return (images - goal.view_as(images)).square().sum()


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.7, max_iter=4, line_search_fn="strong_wolfe")


QUIET = {"progress": False, "perturbation_scale": 0.0, "renormalize_latents": False, "clip_grad_value": None}


@pytest.mark.parametrize("tied", [True, False])
def test_lbfgs_on_the_start_is_that_of_plain_torch(tied: bool) -> None:
    result = doodl_fast.optimize(tiny_chain(), START, None, loss, 3, optimizer=lbfgs, tied_latents=tied, **QUIET)
    leaves = [START.clone().requires_grad_() for _ in range(1 if tied else 2)]
    optimizer = lbfgs(leaves)
    chain = tiny_chain(memory="naive")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = sum(loss(end) for end in chain(leaves[0], leaves[-1])) / 2
        total.backward()
        return total

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert result.losses == pytest.approx(losses, rel=1e-8) and losses[2] < 0.5 * losses[0]
    assert relative(result.latents[1], leaves[-1]) < 1e-8


def test_lbfgs_on_several_variables_moves_one_at_a_time() -> None:
    variables = {"start": {}, "prompt_embeds": {}}
    result = doodl_fast.optimize(tiny_chain(), START, None, loss, 3, optimizer=lbfgs, variables=variables, **QUIET)
    assert result.losses == sorted(result.losses, reverse=True)
    alone = doodl_fast.optimize(tiny_chain(), START, None, loss, 1, optimizer=lbfgs, **QUIET)
    assert result.losses[1] < alone.final_loss


def test_lbfgs_says_what_has_no_effect() -> None:
    with pytest.warns(RuntimeWarning, match="LBFGS evaluates the loss several .*, so clip_grad_value has no effect"):
        doodl_fast.optimize(tiny_chain(), START, None, loss, 1, optimizer=lbfgs, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        doodl_fast.optimize(tiny_chain(), START, None, loss, 1, optimizer=lbfgs, **QUIET)


SCHEDULES: dict[str, Any] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 4], 0.3),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "in sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.7)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_followed_and_resumed(kind: str, tmp_path: Any) -> None:
    """The steps are those of plain torch with the schedule, and a resumed run has the same bits."""

    def factory(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.05)

    options = {"optimizer": factory, "scheduler": SCHEDULES[kind], **QUIET}
    whole = doodl_fast.optimize(tiny_chain(), START, None, loss, 6, **options)
    doodl_fast.optimize(tiny_chain(), START, None, loss, 3, **options, folder=tmp_path)
    resumed = doodl_fast.optimize(tiny_chain(), START, None, loss, 6, **options, resume=tmp_path)
    assert torch.equal(resumed.latents[0], whole.latents[0]) and resumed.losses == whole.losses
    leaf = START.clone().requires_grad_()
    optimizer = factory([leaf])
    schedule, chain = SCHEDULES[kind](optimizer), tiny_chain(memory="naive")
    for _ in range(6):
        optimizer.zero_grad()
        total = sum(loss(end) for end in chain(leaf, leaf)) / 2
        (total / 2).backward()  # the half of the pair's update
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR warns of itself
            schedule.step(float(total)) if kind == "plateau" else schedule.step()
    assert relative(whole.latents[0], leaf) < 1e-8


def test_a_schedule_without_an_optimizer_changes_momentum_sgd() -> None:
    constant = {"grad_scale": 3.0, "perturbation_scale": 0.0, "loss": quiet_loss}
    same = optimize(**constant, scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    assert torch.allclose(same.latents[0], optimize(**constant).latents[0], atol=1e-6)
    never = optimize(**constant, scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 0.0))
    start = problem()["latents"]
    assert torch.allclose(never.latents[0], start, atol=1e-6)


def test_options_that_the_optimizer_does_not_have_are_named() -> None:
    with pytest.raises(TypeError, match=r"optimizer: expected options of SGD \(lr, momentum, .*, got 'beta'"):
        Stepper(torch.optim.SGD, [torch.ones(1)], None, {"lr": 0.1, "beta": 1})
