"""Bad input ends in one clear line: the argument, what was expected, what came, what to do."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, latents, tiny_chain

from doodl_fast.chain.chain import Chain
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.solvers.edict import EDICT

GOOD = torch.zeros(1, 3, 4, device=DEVICE)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        ("noise", None, TypeError, "x: expected a tensor, got str"),
        (GOOD, [1.0], TypeError, "y: expected a tensor, got list"),
        (GOOD.long(), None, TypeError, r"x: expected a tensor of fp16, .* got torch.int64; convert it with .float\(\)"),
        (GOOD.to(torch.complex64), None, TypeError, "x: .* got torch.complex64"),
        (
            torch.zeros(3, device=DEVICE),
            None,
            ValueError,
            r"x: expected shape \(B, C, \.\.\.\), got \(3,\); add a batch dimension, x\[None\]",
        ),
        (GOOD, torch.zeros(1, 3, 5, device=DEVICE), ValueError, r"y: expected x's shape \(1, 3, 4\), got \(1, 3, 5\)"),
        (GOOD, torch.zeros(2, 3, 4, device=DEVICE), ValueError, r"y: expected x's shape"),
        (
            GOOD,
            GOOD.double(),
            ValueError,
            r"y: expected x's dtype torch.float32, got torch.float64; use y.to\(x.dtype\)",
        ),
        (GOOD, GOOD.to("meta"), ValueError, rf"y: expected x's device {GOOD.device}, got meta; use y.to\(x.device\)"),
        (GOOD / 0, None, ValueError, "x: expected finite latents, got NaN or Inf"),
        (GOOD, GOOD + float("inf"), ValueError, "y: expected finite latents, got NaN or Inf"),
    ],
)
def test_bad_latents(x, y, error, message, inverse):
    chain = tiny_chain(2, dtype=torch.float32)
    with pytest.raises(error, match=message):
        (chain.inverse if inverse else chain)(x, y)


@pytest.mark.parametrize("memory", [0, -1, True, False, "everything", "", None, 2.0])
def test_bad_memory(memory):
    message = "memory: expected one of 'checkpoint', 'reversible', 'naive', 'auto' or an int of at least 1, got "
    with pytest.raises(ValueError, match=message):
        tiny_chain(2, memory)
    chain = tiny_chain(2, "reversible")
    with pytest.raises(ValueError, match=message):
        chain.memory = memory
    assert chain.memory == "reversible"


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16, torch.int64, "float32"])
def test_bad_state_dtype(state_dtype):
    with pytest.raises(ValueError, match=r"state_dtype: expected torch.float32, torch.float64 or None"):
        tiny_chain(2, state_dtype=state_dtype)


@pytest.mark.parametrize("weight", [0.0, 1.5, -1, float("nan"), "half"])
def test_bad_mix_weight(weight):
    with pytest.raises(ValueError, match=r"mix_weight: expected a number in \(0, 1\]"):
        tiny_chain(2, mix_weight=weight)


def test_wrong_parts():
    chain = tiny_chain(2)
    with pytest.raises(
        TypeError, match=r"denoiser: expected a Denoiser, got TinyNet; use Denoiser\(unet, cond, uncond\)"
    ):
        EDICT(TinyNet(), chain.schedule)
    with pytest.raises(TypeError, match=r"schedule: expected a Schedule, got int; use Schedule.from_scheduler"):
        EDICT(chain.denoiser, 50)


def test_read_only_parts():
    chain = tiny_chain(2)
    for name in ("denoiser", "schedule", "mix_weight"):
        with pytest.raises(AttributeError):
            setattr(chain, name, None)


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "naive"])
def test_networks_of_the_wrong_shape(memory):
    chain = tiny_chain(2, memory, network=lambda x, t, cond: torch.cat([x, x], dim=1))
    x, y = latents(1, 3, 4, grad=True)
    with pytest.raises(
        ValueError, match=r"unet: expected an output of its input's shape \(2, 3, 4\), got \(2, 6, 4\); wrap"
    ):
        chain(x, y)


def test_evaluators_of_the_wrong_shape():
    """A value that would broadcast is an error as well."""

    class Narrow(Denoiser):
        def __call__(self, x, *args):
            return x[:, :1]

    x, y = latents(1, 3, 4)
    with pytest.raises(ValueError, match=r"evaluator: expected a value of shape \(1, 3, 4\), got \(1, 1, 4\)"):
        Chain(Narrow(TinyNet(), None), [Coupling(0, b=1.0)])(x, y)


def test_conditions_of_another_batch():
    chain = EDICT(Denoiser(TinyNet().double(), conditions(batch=2)[0]), tiny_chain(2).schedule)
    with pytest.raises(ValueError, match=r"cond: expected a leading dimension of 1 or 3 \(the latents' batch\), got 2"):
        chain(latents(3, 3, 4)[0])


@pytest.mark.parametrize("memory", ["checkpoint", "naive"])
def test_networks_with_active_dropout(memory):
    net = TinyNet().double()
    net.add_module("drop", torch.nn.Dropout(0.1))
    chain = tiny_chain(2, memory, network=net.train())
    with pytest.raises(ValueError, match=r"Dropout 'drop' is in training mode .* call unet.eval\(\) first"):
        chain(latents(1, 3, 4)[0])
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ["drift_tolerance", "state_dtype", "arithmetic", "evaluator", "denoiser", "schedule"])
def test_what_a_chain_was_made_with_cannot_be_set_later(name):
    """Setting it would have no effect, or bypass the checks."""
    chain = tiny_chain(2)
    with pytest.raises(AttributeError, match=f"property '{name}' of 'EDICT' object has no setter|can't set attribute"):
        setattr(chain, name, getattr(chain, name))
