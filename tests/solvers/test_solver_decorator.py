"""`@solver` makes of a program function the class that was written by hand for it, and what it refuses."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import TinyNet, conditions, latents, pull, sd_scheduler

import doodl_fast
from doodl_fast import BDIA, EDICT, Denoiser, Schedule, shapes
from doodl_fast.solvers.bdia import bdia_program
from doodl_fast.solvers.edict import edict_program


def made(kind, steps=6, **options):
    return kind(
        Denoiser(TinyNet().double(), *conditions(), 3.0), Schedule.from_scheduler(sd_scheduler(), steps), **options
    )


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.5}, {"gamma": 0.5, "memory": "reversible"}, {"arithmetic": "exact64"}]
)
def test_it_is_the_class_written_by_hand(options):
    own = doodl_fast.solver(bdia_program)
    x = latents(1, 3, 4, grad=True)[0]
    (mine, theirs) = (made(kind, **options) for kind in (own, BDIA))
    assert all(torch.equal(a, b) for a, b in zip(mine(x), theirs(x), strict=True))
    assert torch.equal(pull(mine(x), [x])[0], pull(theirs(x), [x])[0])
    assert own.__name__ == "bdia_program" and own.__doc__ == bdia_program.__doc__
    assert list(inspect.signature(own).parameters)[:3] == ["denoiser", "schedule", "gamma"]


def test_a_pair_starts_from_noise_in_both_latents():
    @doodl_fast.solver(pair=True)
    def Own(schedule, mix_weight=0.93):
        return edict_program(schedule, mix_weight)

    x = latents(1, 3, 4)[0]
    pairs = zip(made(Own, mix_weight=0.8)(x), made(EDICT, mix_weight=0.8)(x), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_it_is_made_from_a_pipeline():
    chain = doodl_fast.solver(bdia_program).from_pipeline(
        shapes.load_pipeline(), "a red circle", num_inference_steps=4, gamma=0.5, memory="checkpoint"
    )
    by_hand = BDIA.from_pipeline(
        shapes.load_pipeline(), "a red circle", num_inference_steps=4, gamma=0.5, memory="checkpoint"
    )
    assert torch.equal(chain(chain.noise())[0], by_hand(by_hand.noise())[0])


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"make_program: expected a function of a schedule, got .*takes no argument"):
        doodl_fast.solver(lambda: ())
    with pytest.raises(TypeError, match=r"expected options of other names than the chain's own, got 'memory'"):
        doodl_fast.solver(lambda schedule, memory: ())
    own = doodl_fast.solver(bdia_program)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'delta'"):
        made(own, delta=1)
