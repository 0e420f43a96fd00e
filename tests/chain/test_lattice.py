"""Exact arithmetic: the lattice's range and its faults, the programs that it can represent, and the size of buffers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import DEVICE, latents, pull
from ops_cases import require
from test_exact import Gentle, exact_chain

from doodl_fast import ops
from doodl_fast.chain.chain import Chain
from doodl_fast.chain.exact.lattice import to_lattice, words_needed
from doodl_fast.chain.program import Coupling, invert

# Range


class Spike(Gentle):
    """Returns `value` everywhere at one timestep."""

    def __init__(self, t: int, value: float) -> None:
        super().__init__()
        self.t, self.value = t, value

    def forward(self, x, t, cond=None):
        return torch.full_like(x, self.value) if int(t) == self.t else super().forward(x, t, cond)


@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1e9, OverflowError, r"out of the range of exact arithmetic \(\+-121\.4 at the noise, \+-512 at the image\)"),
        (1e300, OverflowError, r"in step 1, where y is updated at timestep 500; look for .*arithmetic=\"exact64\""),
        (float("inf"), FloatingPointError, r"evaluator: NaN or Inf in step 1, where y is updated at timestep 500"),
        (float("nan"), FloatingPointError, r"try the network in bf16 or fp32"),
    ],
)
def test_faults_name_the_step(value, error, message, backend):
    require(backend)
    dtype = torch.float64 if value == 1e300 else torch.float32
    chain = exact_chain(4, guidance_scale=1.0, dtype=dtype, network=Spike(500, value).to(dtype))
    x, y = latents(1, 3, 4, dtype=torch.float32)
    with ops.backend(backend), pytest.raises(error, match=message):
        chain(x, y)


def test_latents_out_of_range_and_the_wider_lattice():
    x = torch.full((1, 3, 2), 600.0, device=DEVICE)
    with pytest.raises(OverflowError, match=r"at the start; .* use arithmetic=\"exact64\""):
        exact_chain(3)(x)
    wide = exact_chain(3, arithmetic="exact64")
    assert wide(x)[0].isfinite().all()
    with pytest.raises(OverflowError, match='use arithmetic="float"'):
        wide.state(x * 1000)


def test_a_network_that_fails_in_the_backward_pass_alone():
    net = Spike(500, float("nan"))
    net.t = -1
    chain = exact_chain(4, "reversible", guidance_scale=1.0, network=net)
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    outputs = chain(x, y)
    net.t = 500
    with pytest.raises(FloatingPointError, match="timestep 500"):
        pull(outputs, [x, y])


# Programs and buffers


@pytest.mark.parametrize(
    ("weight", "works"), [(0.0001, True), (0.00004, False), (0.9999, True), (0.99996, True), (1.0, True)]
)
def test_which_mix_weights_can_be_had(weight, works):
    with contextlib.nullcontext() if works else pytest.raises(ValueError, match=r"mixing factors a > 0 .*mix_weight"):
        exact_chain(3, mix_weight=weight)


def test_what_cannot_be_represented():
    with pytest.raises(ValueError, match=r"a=-0\.5 at step 7"):
        to_lattice([Coupling(0, -0.5, 0.1, step=7)], "exact")
    with pytest.raises(ValueError, match=r"a=1\.2347 at step 0"):
        to_lattice([Coupling(0, 1.2347, 0.1)], "exact")
    with pytest.raises(ValueError, match=r'scale changes less: here by 1\.05e\+06.*use arithmetic="exact64"'):
        to_lattice([Coupling(0, 2.0**20, b=0.1, tag=1)], "exact")
    assert to_lattice([Coupling(0, 2.0**20, b=0.1, tag=1)], "exact64").fraction_bits == 24
    with pytest.raises(ValueError, match=r"cannot hold the scale .* at step 0"):
        to_lattice([Coupling(0, 1e-200)], "exact")
    with pytest.raises(ValueError, match="arithmetic: expected one of 'float', 'exact', 'exact64', got 'int'"):
        exact_chain(3, arithmetic="int")


def test_naive_is_refused():
    message = r'memory: "naive" is plain autograd, .*use "checkpoint", an int or "reversible"'
    with pytest.raises(ValueError, match=message):
        exact_chain(3, "naive")
    chain = exact_chain(3)
    with pytest.raises(ValueError, match=message):
        chain.memory = "naive"
    assert chain.memory == "checkpoint" and chain.arithmetic == "exact"


def test_words_of_a_buffer():
    """Four words serve 1000 steps at p = 0.93 in both directions. What needs more gets more, and stays exact."""
    program = exact_chain(1000).program
    assert words_needed(program) == words_needed(invert(program)) == 4
    # A bound on a buffer grows by log2(100 / 93) bits a step from at most log2(1400).
    assert words_needed(program, (2**150, 0)) == -(-round(150 + 104.7 + 0.5) // 31)
    steep = exact_chain(60, mix_weight=0.1)  # Its buffers grow by 3.3 bits a step.
    assert words_needed(steep.program) == 7
    x, y = latents(1, 3, 4)
    start = steep.state(x, y)
    reached = steep.forward_state(start)
    assert len(start.x_buffer) == len(reached.x_buffer) == 7 and reached.x_buffer[6].any()
    assert steep.inverse_state(reached).equals(start)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ((Coupling(0, 0.0, 1.0, step=2),), r"that can be undone, got a = 0 at step 2"),
        ((Coupling(2, 1.0, 1.0, source=0),), r"got more than two latents"),
    ],
)
def test_programs_that_no_lattice_holds(program, message):
    with pytest.raises(ValueError, match=message):
        Chain(lambda x, t: x, program, arithmetic="exact")
