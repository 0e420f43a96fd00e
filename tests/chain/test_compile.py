"""Compiled networks: the gradient of compiled naive backpropagation, reversal that stays exact, smaller graphs."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyNet, conditions, latents, relative, tiny_chain
from tolerances import FP32, FP64

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.solvers.edict import EDICT


@pytest.fixture(scope="module")
def denoiser():
    cond, uncond = conditions(dtype=torch.float32)
    return Denoiser(TinyNet(), cond, uncond, 3.0, compile=True)


def gradient(denoiser, memory, arithmetic="float"):
    chain = EDICT(denoiser, tiny_chain(4).schedule, memory=memory, arithmetic=arithmetic)
    x, y = latents(1, 3, 8, dtype=torch.float32, grad=True)
    outputs = chain(x, y)
    return torch.autograd.grad(outputs[0].sum() - outputs[1].square().sum(), [x, y]), chain


def test_every_mode(denoiser):
    plain = Denoiser(denoiser.unet, denoiser.cond, denoiser.uncond, 3.0)
    expected, _ = gradient(plain, "checkpoint")
    for memory in ("checkpoint", "naive", 2, "reversible", "auto"):
        got, chain = gradient(denoiser, memory)
        assert all(relative(a, b) < FP32 for a, b in zip(got, expected, strict=True))
        assert chain.drift is None or chain.drift < 1e-6
    assert denoiser.unet is plain.unet and all(p.requires_grad for p in denoiser.unet.parameters())


def test_exact_reversal_stays_exact(denoiser):
    """Whether the compiled network gives the same bits with a graph as without is not assumed: the drift says so."""
    kept, _ = gradient(denoiser, "checkpoint", "exact")
    undone, chain = gradient(denoiser, "reversible", "exact")
    assert chain.drift == 0
    assert all(torch.equal(a, b) for a, b in zip(kept, undone, strict=True))


@pytest.mark.parametrize("memory", ["checkpoint", 2, "reversible", "auto", "naive"])
def test_a_compiled_function_around_a_chain(memory):
    """The compiler breaks its graph at what a chain reads on the host; the gradient is the same."""
    chain = tiny_chain(3, memory)
    x, _ = latents(1, 3, 4, grad=True)
    expected = torch.autograd.grad(chain(x)[0].square().sum(), x)[0]
    function = torch.compile(lambda z: chain(z)[0].square().sum(), backend="aot_eager")
    assert relative(torch.autograd.grad(function(x), x)[0], expected) < FP64


def test_a_compiled_graph_is_no_larger(denoiser):
    """So a plan made for the network itself, which is what a tracker sees, holds.

    A graph that is compiled for one timestep keeps its embedding and a number beside what grows with the latents.
    """
    x = latents(1, 3, 64, dtype=torch.float32, grad=True)[0]
    held = []
    for made in (Denoiser(denoiser.unet, denoiser.cond, denoiser.uncond, 3.0), denoiser):
        saved: dict[int, int] = {}

        def note(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with made.running(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made(x, 3)
        held.append(sum(size for size in saved.values() if size > 64))
    assert 0 < held[1] <= held[0]
